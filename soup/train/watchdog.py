"""The loss watchdog: stops a run whose loss or gradient goes wrong, before the optimizer steps on it."""

from __future__ import annotations

import math
import shutil
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from soup.record import Run, now, read_json, write_json
from soup.train import ranks
from soup.train.trainer import STATE

SPIKE = 10.0  # times the median of the last steps
WINDOW, ENOUGH = 50, 10  # steps whose median is taken, and how many it needs
RATE, ROLLBACKS = 0.5, 3  # each rollback's factor on the learning rate, and how many there may be


class Diverged(Exception):
    """The loss or its gradient went wrong at `step`, before its update."""

    def __init__(self, step: int, why: str):
        super().__init__(f"{why} at step {step}")
        self.step = step


class Watchdog(TrainerCallback):
    """Judges each step before its update. The trainer reports the loss of every micro-step to `saw`.

    At once: a loss or a gradient that is not finite, and, of given rows, a loss of exactly zero (no token is learnt).
    After `patience` bad steps in a row: a loss above `threshold`, or, of given rows, above 10 times the median of
    the last 50 good steps. `given_rows` is false where rows are generated while training: a policy gradient's
    loss is zero where all rewards agree, and its size means little. `rolls_back`: what whoever catches `Diverged` is
    to do.
    """

    def __init__(self, *, threshold: float, patience: int, given_rows: bool, rolls_back: bool):
        self.threshold, self.patience = threshold, patience
        self.given_rows, self.rolls_back = given_rows, rolls_back
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.bad = 0  # steps in a row
        self._step_loss: Any = 0.0

    def saw(self, loss: torch.Tensor) -> None:
        """A micro-step's loss, divided by the number of micro-steps."""
        self._step_loss = self._step_loss + loss.detach()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        loss, self._step_loss = ranks.mean(float(self._step_loss)), 0.0
        # A gradient scaler looks for infinite float16 gradients itself, skips the step and scales less.
        norm = 0.0 if args.fp16 else _gradient_norm(live["model"])
        self.judge(state.global_step + 1, loss, norm)

    def judge(self, step: int, loss: float, gradient_norm: float) -> None:
        """Counts the step as good or bad.

        Raises:
            Diverged: it must not be taken.
        """
        if not math.isfinite(loss):
            raise Diverged(step, f"the loss is {loss}")
        if not math.isfinite(gradient_norm):
            raise Diverged(step, f"the gradient's norm is {gradient_norm} and the loss {loss:.4g}")
        if self.given_rows and loss == 0:
            raise Diverged(step, "the loss is exactly 0")
        usual = statistics.median(self.losses) if len(self.losses) >= ENOUGH and self.given_rows else math.inf
        if loss <= min(self.threshold, SPIKE * usual):
            self.losses.append(loss)
            self.bad = 0
            return
        self.bad += 1
        if self.bad >= self.patience:
            why = (
                f"above {self.threshold:g}"
                if loss > self.threshold
                else f"above {SPIKE:g} x its median {usual:.4g}"
            )
            raise Diverged(step, f"the loss is {loss:.4g}, {why} for {self.bad} steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.bad:  # so that the last checkpoint stays a good one
            control.should_save = False
        return control

    def to_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "bad": self.bad}

    def restore(self, kept: Mapping[str, Any]) -> None:
        self.losses, self.bad = deque(kept["losses"], maxlen=WINDOW), kept["bad"]


def _gradient_norm(model: Any) -> float:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # of shares


def rollbacks(run: Run) -> list[dict[str, Any]]:
    """The run's rollbacks so far: time, step, why, and the checkpoint that it went back to."""
    return read_json(_file(run)) or []


def rate(run: Run) -> float:
    """What the rollbacks make of the learning rate, as a factor."""
    return RATE ** len(rollbacks(run))


def roll_back(run: Run, diverged: Diverged) -> str | None:
    """Takes the run back to its last checkpoint that no bad step preceded, and notes that.

    Returns the checkpoint's name, `None` where there is none or the run went back too often already.
    """
    before = rollbacks(run)
    newest_first = sorted(
        run.checkpoints.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])
    )
    good = next((path for path in newest_first if _good(path)), None)
    if good is None or len(before) >= ROLLBACKS:
        return None
    for bad in newest_first[: newest_first.index(good)]:
        shutil.rmtree(bad)
    entry = {"time": now(), "step": diverged.step, "why": str(diverged), "checkpoint": good.name}
    write_json(_file(run), [*before, entry])
    return good.name


def _good(checkpoint: Path) -> bool:
    return read_json(checkpoint / STATE)["watchdog"]["bad"] == 0


def _file(run: Run) -> Path:
    return run.folder / "rollbacks.json"
