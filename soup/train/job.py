"""One run from its folder to its result: the whole wiring."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from soup import effects, pruning
from soup.device import resolve
from soup.effects import distributed
from soup.errors import Problem, Refused
from soup.inputs import content
from soup.kernels import fast
from soup.model import source
from soup.record import Run, read_json, write_json
from soup.schema import Config, check
from soup.train import ranks
from soup.train.build import Built, build
from soup.train.callbacks import Loop, Recorder
from soup.train.finish import save_model
from soup.train.memory import peak_memory_bytes
from soup.train.progress import Display
from soup.train.pruning import Early
from soup.train.stopper import Stopper
from soup.train.tracking import open_trackers
from soup.train.trainer import cut_metrics
from soup.train.watchdog import Diverged, rate, roll_back, rollbacks


def train(run: Run, display: Display, stopper: Stopper) -> str:
    """Trains the run to its end or to where it is asked to stop, and returns its status.

    "rolled back": the run is one whose training goes on from an earlier checkpoint, by another call.

    Raises:
        Refused: what the folder says cannot be built.
        NotInForce: a setting did not take effect.
    """
    config = check(run.tree())
    say: Callable[[str], None] = lambda text: display.console.print(  # noqa: E731
        text, highlight=False, soft_wrap=True
    )
    try:
        built = prepare_run(run, config, partial(_unless_stopped, say, stopper))
    except _Stopped:
        if ranks.first():
            run.finish("interrupted", error=f"stopped by {stopper.asked}", step=0, steps=0)
        return "interrupted"
    effects.required(recorded(run, effects.prove(built)))
    say(f"precision: {built.precision.reason}")
    if built.attention is not None:
        say(f"attention: {built.attention}")
    say(f"kernels: {fast.told(built.kernels)}")
    checkpoint = run.last_checkpoint()
    if ranks.first():
        cut_metrics(run.metrics, checkpoint)
    if checkpoint is not None:
        say(f"resuming from {checkpoint.name}")
    trackers = open_trackers(config, run, say) if ranks.first() else []
    trainer = built.trainer
    trainer.metrics_file = run.metrics
    trainer.rate_factor = rate(run)
    if config.distributed.world > 1:
        trainer.add_callback(_Begun(run, built))
    trainer.add_callback(Loop(trainer, stopper, checkpoint))
    if ranks.first():
        trainer.add_callback(Recorder(run, display, trackers))
    early = _early(run, checkpoint)
    if early is not None:
        trainer.add_callback(early)
    status = "failed"
    try:
        try:
            if not ranks.asked(stopper) and (early is None or early.why is None):
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            status, details = ranks.of_first(_outcome(trainer, stopper, run))
            if early is not None and early.why is not None:
                say(f"pruned: {early.why}")
                status, details = "pruned", {**details, "error": early.why}
        except Diverged as diverged:
            back = None
            if trainer.watchdog.rolls_back:
                back = ranks.of_first(roll_back(run, diverged) if ranks.first() else None)
            if back is not None:
                say(f"{diverged}: back to {back}, at {rate(run):g} of the learning rate")
                status = "rolled back"
                return status
            status, details = "diverged", {"error": str(diverged), **_details(trainer, run)}
        if status == "finished":
            save_model(run, built, details)
        if ranks.first():
            run.finish(status, **details)
    finally:
        display.stop()
        for tracker in trackers:
            tracker.finish(status)
    return status


def _early(run: Run, checkpoint: Path | None) -> Early | None:
    """What stops a bad point of a sweep, which may have said so just before a crash."""
    pruner = pruning.of(run)
    if pruner is None:
        return None
    early = Early(pruner)
    step = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    early.why = ranks.of_first(pruner.over(step) if ranks.first() else None)
    return early


class _Stopped(Exception):
    """The run is asked to stop before its training begins."""


def _unless_stopped(say: Callable[[str], None], stopper: Stopper, text: str) -> None:
    if stopper.asked is not None:
        raise _Stopped
    if text:
        say(text)


def prepare_run(run: Run, config: Config, say: Callable[[str], None] = lambda _: None) -> Built:
    """Builds what the run folder asks for; its inputs must be those that it was planned with."""
    device = resolve(config.launch.device)
    ranks.join(config, device)
    model_folder = source.folder(config.model)
    planned = read_json(run.folder / "inputs.json")
    found = content(config, model_folder)
    changed = [key for key in found if planned[key] != found[key]]
    if changed:
        raise Refused(
            Problem(
                key=f"{changed[0]}",
                why=f"the {' and the '.join(changed)} changed after this run was planned",
                fix="give the command again: changed inputs are a new run",
            )
        )
    return build(
        config,
        device=device,
        model_folder=model_folder,
        output=run.checkpoints,
        say=say,
    )


def recorded(run: Run, found: list[effects.Effect], *, more: bool = False) -> list[effects.Effect]:
    """Writes effective.json, or `more` into it. What one process found wrong stays wrong, whatever the others found."""
    by_rank = ranks.gather(found)
    proved = [next((one for one in same if not one.ok), same[0]) for same in zip(*by_rank, strict=True)]
    if ranks.first():
        before = read_json(run.effective) if more else {}
        write_json(run.effective, before | effects.to_json(proved))
    return proved


def _outcome(trainer: Any, stopper: Stopper, run: Run) -> tuple[str, dict[str, Any]]:
    """Status, and what is known at the end."""
    state = trainer.state
    details = _details(trainer, run)
    if stopper.asked is not None and (state.global_step < state.max_steps or state.max_steps == 0):
        return "interrupted", {"error": f"stopped by {stopper.asked}", **details}
    if not math.isfinite(details.get("loss", 0.0)):
        return "diverged", {"error": f"the loss is {details['loss']} at step {details['step']}", **details}
    return "finished", details


def _details(trainer: Any, run: Run) -> dict[str, Any]:
    """The last value of each logged metric, how far the run came, and what it took."""
    last: dict[str, Any] = {}
    for line in run.lines():
        last |= line
    back = len(rollbacks(run))
    return {
        **last,
        "step": trainer.state.global_step or _saved(run),  # 0: stopped before its first step
        "steps": trainer.state.max_steps,
        "peak_memory_bytes": peak_memory_bytes(),
        **({"rollbacks": back} if back else {}),
    }


def _saved(run: Run) -> int:
    last = run.last_checkpoint()
    return 0 if last is None else int(last.name.rpartition("-")[2])


def prove(run: Run) -> None:
    """Builds the run and proves its settings, without a step."""
    built = prepare_run(run, check(run.tree()))
    recorded(run, effects.prove(built))
    if built.config.distributed.world > 1:
        built.trainer.add_callback(_Begun(run, built, stop=True))
        with suppress(_Proved):
            built.trainer.train()


class _Proved(Exception):
    """Training has begun, and that was all that was asked for."""


class _Begun(TrainerCallback):
    """Proves how the model is spread over the processes: what does that is made when training begins."""

    def __init__(self, run: Run, built: Built, *, stop: bool = False):
        self.run, self.built, self.stop = run, built, stop

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        proved = recorded(self.run, [distributed.spread(self.built)], more=True)
        if self.stop:
            raise _Proved
        effects.required(proved)
