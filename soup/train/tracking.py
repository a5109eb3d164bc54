"""Experiment trackers behind one small interface; the run's id is the tracker's, so a resumed run continues."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from soup.effects import Effect, required, to_json
from soup.record import Run, read_json, write_json
from soup.schema import Config
from soup.specs import TrackerSpec
from soup.train.trackers import MLflow, Trackio


class Tracker(Protocol):
    """Receives each line of metrics.jsonl, and the end."""

    def log(self, line: Mapping[str, Any]) -> None: ...

    def finish(self, status: str) -> None: ...

    def in_force(self) -> dict[str, Any]:
        """Its settings as the open tracker has them, by their keys."""
        ...


class Wandb:
    """Weights & Biases: run id, configuration, metrics and its own system figures."""

    def __init__(self, spec: TrackerSpec, run: Run, config: Config, say: Any):
        import wandb

        self._say = say
        settings = spec.settings
        mode = settings["mode"]
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") or _netrc_has("api.wandb.ai") else "offline"
            if mode == "offline":
                say("wandb: no API key is set, so it records offline; `wandb sync` uploads it later")
        self._run = wandb.init(
            project=settings["project"],
            entity=settings["entity"],
            tags=list(settings["tags"]),
            id=run.id,
            name=config.run.name or run.id,
            group=os.environ.get("SOUP_SWEEP"),
            resume="allow",
            mode=mode,
            dir=str(run.folder),
            config=dict(config.tree),
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, line: Mapping[str, Any]) -> None:
        with self._without_its_process():
            if self._run is not None:
                self._run.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])

    def finish(self, status: str) -> None:
        with self._without_its_process():
            if self._run is not None:
                self._run.summary["status"] = status
                self._run.finish(exit_code=0 if status == "finished" else 1)

    def in_force(self) -> dict[str, Any]:
        return {
            "project": self._run.project,
            "tags": tuple(self._run.tags or ()),
            "mode": self._run.settings.mode,
        }

    @contextmanager
    def _without_its_process(self) -> Iterator[None]:
        """wandb's own process ends on the SIGTERM that SLURM sends to every process of a job that is to stop; the run
        must save then, and goes on under the same id."""
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        try:
            yield
        except (ConnectionError, HandleAbandonedError, MailboxClosedError) as error:
            self._run = None
            self._say(f"wandb: its process is gone ({error}); metrics.jsonl has what it did not get")


class TensorBoard:
    """TensorBoard event files in the run folder."""

    def __init__(self, spec: TrackerSpec, run: Run, config: Config, say: Any):
        import json

        from torch.utils.tensorboard import SummaryWriter

        self._run, last = run, run.last_checkpoint()
        # The steps after the checkpoint come once more; so do all of them where a crash left none.
        step = int(last.name.rpartition("-")[2]) + 1 if last else 0
        self._writer = SummaryWriter(str(run.folder / spec.settings["folder"]), purge_step=step)
        if last is None:
            self._writer.add_text(
                "config", "    " + json.dumps(config.tree, indent=2).replace("\n", "\n    ")
            )
        say(f"tensorboard: tensorboard --logdir {run.folder / spec.settings['folder']}")

    def log(self, line: Mapping[str, Any]) -> None:
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, line["step"])

    def in_force(self) -> dict[str, Any]:
        return {"folder": str(Path(self._writer.log_dir).relative_to(self._run.folder))}

    def finish(self, status: str) -> None:
        self._writer.add_text("status", status)
        self._writer.close()


OPEN = {"wandb": Wandb, "tensorboard": TensorBoard, "mlflow": MLflow, "trackio": Trackio}


def open_trackers(config: Config, run: Run, say: Any) -> list[Tracker]:
    """Opens what `tracking` names, and writes into effective.json what is in force; `say` prints a line for the user.

    Raises:
        NotInForce: a tracker was opened with another setting than it was given.
    """
    opened: list[Tracker] = []
    settled: list[Effect] = []
    try:
        for spec in config.tracking:
            tracker = OPEN[spec.name](spec, run, config, say)
            opened.append(tracker)
            settled += list(_settled(spec, tracker))
        proved = read_json(run.effective) or {}
        write_json(run.effective, proved | to_json(settled))
        required(settled)
    except BaseException:
        for tracker in opened:
            tracker.finish("failed")
        raise
    return opened


def _settled(spec: TrackerSpec, tracker: Tracker) -> Iterator[Effect]:
    for key, effective in tracker.in_force().items():
        requested = spec.settings[key]
        left_open = requested is None or requested == "auto"
        ok = left_open or requested == effective
        yield Effect(
            f"tracking.{spec.name}.{key}", requested, effective, ok, f"read from the open {spec.name}"
        )


def _netrc_has(host: str) -> bool:
    import netrc

    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
