"""MLflow and Trackio: a run in the tracker for each of soup's, the same one after a resume."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from filelock import FileLock

from soup.errors import Problem, Refused
from soup.record import Run
from soup.schema import Config
from soup.specs import TrackerSpec

RUN_TAG = "soup.run"
SAME = ("loss", "eval_loss")  # what a repeated step has again, to the bit


class Seen:
    """Lines that the tracker has from before: what a resume trains once more it need not be told twice.

    A step that comes out otherwise (a watchdog's rollback) is told again; trackers keep both.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[str, int], float] = {}

    def add(self, key: str, step: int, value: float) -> None:
        self._values[key, step] = value

    def has(self, line: Mapping[str, Any]) -> bool:
        return any(key in line and self._values.get((key, line["step"])) == line[key] for key in SAME)


class MLflow:
    """MLflow through its client alone: `mlflow.start_run` would hold state for the whole process."""

    def __init__(self, spec: TrackerSpec, run: Run, config: Config, say: Any):
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._say, self._seen = say, Seen()
        # Training must not wait for minutes where a server is gone.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        uri = spec.settings["uri"] or f"sqlite:///{(run.folder.parent / 'mlflow.db').absolute()}"
        try:
            with FileLock(run.folder.parent / ".mlflow.lock"):  # runs of a sweep make one database
                self._client = MlflowClient(tracking_uri=uri)
                self._experiment = self._filed_under(spec.settings["experiment"], uri, run)
                self._id = self._continued(run) or self._begun(run, config)
        except (MlflowException, OSError) as error:
            why = f"cannot be opened: {str(error).strip().splitlines()[0]}"
            fix = "a server that answers, or tracking.mlflow.uri=null for a database beside the runs"
            raise Refused(Problem(key="tracking.mlflow.uri", value=uri, why=why, fix=fix)) from error
        for key in SAME:
            for one in self._client.get_metric_history(self._id, key):
                self._seen.add(key, one.step, one.value)
        for line in run.lines():  # of an earlier process that was killed before it was told
            self.log(line)
        if uri.startswith("sqlite:"):
            say(f"mlflow: mlflow ui --backend-store-uri {uri}")

    def _filed_under(self, experiment: str, uri: str, run: Run) -> str:
        found = self._client.get_experiment_by_name(experiment)
        if found is not None:
            return str(found.experiment_id)
        # For a local database MLflow's default is a folder wherever the command was given.
        local = uri.startswith("sqlite:")
        artifacts = (run.folder.parent / "mlartifacts").absolute().as_uri() if local else None
        return str(self._client.create_experiment(experiment, artifacts))

    def _continued(self, run: Run) -> str | None:
        found = self._client.search_runs([self._experiment], f"tags.`{RUN_TAG}` = '{run.id}'", max_results=1)
        if not found:
            return None
        self._client.update_run(found[0].info.run_id, status="RUNNING")
        return str(found[0].info.run_id)

    def _begun(self, run: Run, config: Config) -> str:
        from mlflow.entities import Param

        tags = {RUN_TAG: run.id, **({"soup.sweep": sweep} if (sweep := os.environ.get("SOUP_SWEEP")) else {})}
        begun = self._client.create_run(self._experiment, run_name=config.run.name or run.id, tags=tags)
        params = [Param(key, str(value)[:6000]) for key, value in _leaves(config.tree)]
        for start in range(0, len(params), 100):  # as many as MLflow takes at once
            self._client.log_batch(begun.info.run_id, params=params[start : start + 100])
        return str(begun.info.run_id)

    def in_force(self) -> dict[str, Any]:
        experiment = self._client.get_run(self._id).info.experiment_id
        return {
            "uri": self._client.tracking_uri,
            "experiment": self._client.get_experiment(experiment).name,
        }

    def log(self, line: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        if self._seen.has(line):
            return
        now = int(time.time() * 1000)
        values = [
            Metric(key, float(value), now, line["step"])
            for key, value in line.items()
            if key != "step" and isinstance(value, int | float)
        ]
        self._try(lambda: self._client.log_batch(self._id, metrics=values))

    def finish(self, status: str) -> None:
        ended = {"finished": "FINISHED", "interrupted": "KILLED", "pruned": "KILLED"}.get(status, "FAILED")
        self._try(lambda: self._client.set_tag(self._id, "status", status))
        self._try(lambda: self._client.set_terminated(self._id, ended))

    def _try(self, told: Any) -> None:
        """A tracker that is gone is no reason to lose a run."""
        from mlflow.exceptions import MlflowException

        try:
            told()
        except (MlflowException, OSError) as error:
            why = str(error).strip().splitlines()[0]
            self._say(f"mlflow: {why}; metrics.jsonl has what it did not get")


class Trackio:
    """Trackio's local database; `TRACKIO_DIR` says where, and `trackio show` opens it."""

    def __init__(self, spec: TrackerSpec, run: Run, config: Config, say: Any):
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        self._seen, self._project, self._name = Seen(), spec.settings["project"], run.id
        if os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"):
            say("trackio: it sends what it gets to where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says")
        try:
            self._run = trackio.init(
                project=self._project,
                name=self._name,
                group=os.environ.get("SOUP_SWEEP"),
                config=dict(_leaves(config.tree)),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        except (ValueError, OSError) as error:
            why = str(error).strip().splitlines()[0]
            fix = "letters, digits, - and _"
            raise Refused(
                Problem(key="tracking.trackio.project", value=self._project, why=why, fix=fix)
            ) from error
        for line in SQLiteStorage.get_logs(self._project, self._name):
            for key in SAME:
                if isinstance(line.get(key), int | float):
                    self._seen.add(key, line["step"], line[key])
        for line in run.lines():
            self.log(line)
        say(f"trackio: trackio show --project {self._project}")

    def in_force(self) -> dict[str, Any]:
        return {"project": self._run.project}

    def log(self, line: Mapping[str, Any]) -> None:
        if not self._seen.has(line):
            self._run.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])

    def finish(self, status: str) -> None:  # noqa: ARG002 - Trackio has no word for it
        self._run.finish()


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found.extend(_leaves(value, f"{prefix}{key}."))
        else:
            found.append((f"{prefix}{key}", value))
    return found
