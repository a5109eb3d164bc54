"""Hooks into the training loop: what is written down at each log, and when to save, evaluate and stop."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from soup.record import Run
from soup.train import ranks
from soup.train.memory import peak_memory_bytes
from soup.train.progress import Display
from soup.train.stopper import Stopper
from soup.train.tracking import Tracker


class Loop(TrainerCallback):
    """Restores what transformers resets, evaluates once at the end, and saves where the run is asked to stop."""

    def __init__(self, trainer: Any, stopper: Stopper, checkpoint: Path | None):
        self.trainer, self.stopper, self.checkpoint = trainer, stopper, checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.checkpoint is not None:
            self.trainer.restore_between_logs(self.checkpoint)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = self.trainer.eval_dataset is not None
        elif ranks.asked(self.stopper):
            control.should_save = control.should_training_stop = True
        return control


class Recorder(TrainerCallback):
    """Appends to metrics.jsonl, shows progress, feeds the trackers."""

    def __init__(self, run: Run, display: Display, trackers: Sequence[Tracker]):
        self.run, self.display, self.trackers = run, display, trackers

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.display.start(state.max_steps, state.global_step)
        self.begun = self.last = time.monotonic()
        self.begun_step = state.global_step
        self.last_tokens = state.num_input_tokens_seen

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.display.step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" not in logs and "eval_loss" not in logs:
            return  # the summary that transformers logs when training ends
        now = time.monotonic()
        line = {"step": state.global_step, "epoch": state.epoch}
        if "loss" in logs:
            tokens = int(state.num_input_tokens_seen)
            line |= {
                "loss": logs["loss"],
                "lr": logs["learning_rate"],
                "grad_norm": logs.get("grad_norm"),
                "tokens": tokens,
                "tokens_per_s": (tokens - self.last_tokens) / (now - self.last),
                "peak_memory_bytes": peak_memory_bytes(),
            }
            self.last_tokens = tokens
        named = {"loss", "learning_rate", "grad_norm", "epoch", "num_tokens", "num_input_tokens_seen"}
        line |= {key: value for key, value in logs.items() if key not in named}
        self.last = now
        with self.run.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        steps = state.global_step - self.begun_step
        left = (now - self.begun) / steps * (state.max_steps - state.global_step) if steps else None
        self.display.log(line, left)
        for tracker in self.trackers:
            tracker.log(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.display.stop()
