"""`tracking=`: where metrics go besides the run folder."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Len

from soup.specs import Package, TrackerSpec

Name = Annotated[str, Len(1)]


def wandb(
    *, project: Name, entity: Name | None, mode: Literal["auto", "online", "offline"], tags: list[Name]
) -> TrackerSpec:
    """Weights & Biases. `mode=auto` goes offline, and says so, where no API key is set."""
    return _tracker("wandb", project=project, entity=entity, mode=mode, tags=tuple(tags))


def tensorboard(*, folder: Name) -> TrackerSpec:
    """TensorBoard event files in `folder`, relative to the run."""
    return _tracker("tensorboard", folder=folder)


def mlflow(*, uri: Name | None, experiment: Name) -> TrackerSpec:
    """MLflow. `uri`: the tracking server; `run.root`/mlflow.db, a local database, if null."""
    return _tracker("mlflow", "mlflow-skinny", uri=uri, experiment=experiment)


def trackio(*, project: Name) -> TrackerSpec:
    """Trackio, a local-first tracker."""
    return _tracker("trackio", project=project)


def _tracker(name: str, distribution: str | None = None, /, **settings: object) -> TrackerSpec:
    package = Package(distribution=distribution or name, extra=name)
    return TrackerSpec(name=name, settings=settings, requires=(package,))
