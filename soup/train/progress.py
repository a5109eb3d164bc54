"""What a person sees while a run trains: a rich progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Shows steps, loss, tokens per second and time left on `console`."""

    def __init__(self, console: Console):
        self.console = console
        self.bar: Progress | None = None

    def start(self, total_steps: int, done_steps: int) -> None:
        self.total = total_steps
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("training", total=total_steps, completed=done_steps, status="")
            self.bar.start()

    def step(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def log(self, line: dict[str, Any], seconds_left: float | None) -> None:
        """One line of metrics.jsonl."""
        if "eval_loss" in line:
            text = f"eval_loss {line['eval_loss']:.4f}"
        else:
            reward = f"  reward {line['reward']:.3f}" if line.get("reward") is not None else ""
            text = f"loss {line['loss']:.4f}{reward}  {line['tokens_per_s']:.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, status=text)
            if "eval_loss" in line:
                self.bar.console.print(f"step {line['step']}/{self.total}  {text}", highlight=False)
            return
        left = "" if seconds_left is None else f"  {_duration(seconds_left)} left"
        self.console.print(f"step {line['step']}/{self.total}  {text}{left}", highlight=False)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
