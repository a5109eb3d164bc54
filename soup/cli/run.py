"""`soup [overrides]`: checks, places, trains. What is finished is skipped, what was interrupted goes on."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soup import inputs
from soup.cli import hints
from soup.cli.check import Checked, valid
from soup.cli.compose import Point, differing
from soup.cli.process import threads, train
from soup.record import Run, environment, place, run_id, write_json

FAILED, INTERRUPTED = 1, 130  # exit status


def run(points: Sequence[Point], args: Namespace) -> int:  # noqa: ARG001
    """Trains every point; returns the exit status."""
    from rich.console import Console

    console = Console(highlight=False)
    ready = valid(points, train=True)
    if hint := hints.unsloth(ready):
        Console(stderr=True, highlight=False).print(hint, soft_wrap=True)
    if len(ready) < len(points):
        console.print(f"{len(points) - len(ready)} of {len(points)} points are invalid and left out")
    placed = [(one, settle(one)) for one in ready]
    status = 0
    for number, (one, where) in enumerate(placed, 1):
        if len(placed) > 1:
            console.rule(f"{number} of {len(placed)}: {' '.join(one.point.overrides)}", align="left")
        status = max(status, _one(where, one, console))
        if status == INTERRUPTED:
            break
    if len(placed) > 1:
        _results(placed, console)
    return status


def settle(one: Checked) -> Run:
    """The point's run folder, with everything that the training process reads."""
    content = inputs.content(one.config, one.model_folder)
    run_config = one.config.run
    where = place(
        Path(run_config.root), run_id(one.config.tree, content), one.config.tree, resume=run_config.resume
    )
    if where.state() == "new":
        write_json(where.folder / "inputs.json", content)
        write_json(where.plan, one.plan.to_dict())
    return where


def _one(where: Run, one: Checked, console: Any) -> int:
    state = where.state()
    if state == "finished":
        console.print(f"run {where.id} is finished: {_summary(where)}")
        console.print(f"it lies in {where.folder}; run.resume=never trains it again in a new folder")
        return 0
    verb = {
        "new": "training",
        "running": "waiting for the process that runs",
        "interrupted": "continuing",
    }.get(state, f"{state} before, trying again:")
    console.print(f"{verb} run {where.id} in {where.folder}")
    report = one.reports["train"]
    learnt = report.lengths["sum_labels"]
    if report.sampled:  # of what trains here only a stream is
        console.print("rows are read while training; of the first ones:")
    if len(report.sources) > 1:
        form = "{rows} rows of {name}" if report.sampled else "{rows} of {read} rows of {name}"
        console.print(", ".join(form.format(**source) for source in report.sources), soft_wrap=True)
    console.print(
        f"{report.rows} rows ({report.format}), {report.lengths['sum']} tokens"
        + (f", {learnt} of them learnt" if learnt else "")
        + f"; {report.truncated} truncated, {report.dropped_nothing_left + report.skipped} too long and left out, "
        f"{report.bad_total} bad and skipped",
        soft_wrap=True,
    )
    planned = one.plan.to_dict()
    console.print(
        f"{planned['steps']} steps; predicted peak memory {planned['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
    if not where.environment.is_file():
        write_json(where.environment, environment() | {"threads": threads(one.config.launch.slots)})
    status = train(where)
    state = where.state()
    if state == "finished":
        console.print(f"finished: {_summary(where)}")
        console.print(f"the model is in {where.model}")
    elif state == "interrupted":
        console.print(f"interrupted; the same command continues it ({where.folder})")
    elif state == "diverged":
        console.print(f"diverged: {(where.result() or {}).get('error')}")
    elif status < 0:
        console.print(f"the training process died of signal {-status}; the same command continues the run")
        return FAILED
    return status


def _results(placed: Sequence[tuple[Checked, Run]], console: Any) -> None:
    """The points of a sweep by their objective, smallest first; those without one last."""
    from soup.cli.runs import table

    objective = placed[0][0].config.run.objective

    def rank(item: tuple[Checked, Run]) -> float:
        value = (item[1].result() or {}).get(objective)
        return value if isinstance(value, int | float) else float("inf")

    console.print(f"\nby {objective}, smallest first:")
    ordered = sorted(placed, key=rank)
    console.print(table([where for _, where in ordered], differing([one.point for one, _ in ordered])))


def _summary(where: Run) -> str:
    result = where.result() or {}
    shown = {
        key: result[key] for key in ("step", "loss", "reward", "eval_loss") if result.get(key) is not None
    }
    return ", ".join(f"{key} {value:.4g}" for key, value in shown.items())
