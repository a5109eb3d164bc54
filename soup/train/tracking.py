"""Experiment trackers behind one small interface; the run's id is the tracker's, so a resumed run continues."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from soup.record import Run
from soup.schema import Config
from soup.specs import TrackerSpec


class Tracker(Protocol):
    """Receives each line of metrics.jsonl, and the end."""

    def log(self, line: Mapping[str, Any]) -> None: ...

    def finish(self, status: str) -> None: ...


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

        last = run.last_checkpoint()
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

    def finish(self, status: str) -> None:
        self._writer.add_text("status", status)
        self._writer.close()


OPEN = {"wandb": Wandb, "tensorboard": TensorBoard}


def open_trackers(config: Config, run: Run, say: Any) -> list[Tracker]:
    """Opens what `tracking` names; `say` prints a line for the user."""
    return [OPEN[spec.name](spec, run, config, say) for spec in config.tracking]


def _netrc_has(host: str) -> bool:
    import netrc

    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
