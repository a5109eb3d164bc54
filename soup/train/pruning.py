"""Asks the sweep's pruner at each value of its objective, and stops the run there where it says so."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from soup.pruning import Pruner
from soup.sweep import metric
from soup.train import ranks


class Early(TrainerCallback):
    """Comes after what writes metrics.jsonl, which the pruner reads. `why`: the reason to stop, once there is one."""

    def __init__(self, pruner: Pruner):
        self.pruner = pruner
        self.metric = metric(pruner.sweep.objective)
        self.why: str | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> Any:
        if self.metric in logs and state.global_step < state.max_steps and self.why is None:
            self.why = self._judged(state, float(logs[self.metric]))
        if self.why is not None:
            # Saved, since a sweep without a pruner goes on from here.
            control.should_save = control.should_training_stop = True
        return control

    def _judged(self, state: Any, value: float) -> str | None:
        """The verdict of the process that writes metrics.jsonl, which all processes of the run follow."""
        return ranks.of_first(self.pruner.judge(state.global_step, value) if ranks.first() else None)
