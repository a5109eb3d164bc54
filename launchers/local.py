"""`launch=local`: the points of a sweep, composed and checked together, then run on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

# A plain mapping: Hydra's plugin scan runs this module before it is in sys.modules, where @dataclass fails.
ConfigStore.instance().store(
    group="hydra/launcher",
    name="soup_local",
    node={"_target_": "hydra_plugins.soup_launchers.local.LocalLauncher"},
    provider="soup",
)


class LocalLauncher(Launcher):
    """Hands every point of a batch to soup at once, so that all are checked before the first one starts."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader = hydra_context.config_loader
        self.task_function = task_function
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Returns one completed job per point, whose return value is the exit status of the batch.

        Raises:
            Refused: with the problems of all points, before any point ran.
        """
        del initial_job_idx  # a run is known by its content, not by its place in a sweep
        from soup.cli.compose import point
        from soup.errors import Problem, Refused

        points, problems = [], dict[Problem, None]()
        for overrides in job_overrides:
            try:
                points.append(point(self.loader.load_sweep_config(self.config, list(overrides))))
            except Refused as refused:
                problems |= dict.fromkeys(refused.problems)
        if problems:
            raise Refused(problems)
        status = self.task_function(points)
        return [
            JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=status)
            for overrides in job_overrides
        ]
