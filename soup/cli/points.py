"""The points of a sweep before the first one starts: which can work, what each would cost, where each stands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from soup.cli.check import Checked
from soup.cli.compose import Point, differing
from soup.cli.table import duration, lines, size
from soup.errors import Refused
from soup.record import Run, run_id

HEADER = ("point", "state", "memory", "steps", "tokens", "disk", "time")
STANDS_IN = ("model", "lengths")  # notes of a plan for a model that is not on this machine
MEASURED = 20  # finished runs that are read to predict times
STATES = {
    "finished": "finished: skipped",
    "failed": "failed: tried again",
    "diverged": "diverged: tried again",
    "running": "runs in another process",
}


def table(
    points: Sequence[Point],
    found: Sequence[Checked | Refused],
    runs: Sequence[Run | None],
    *,
    pruner: bool,
) -> list[str]:
    """A line for each point. `runs`: the run of each, `None` of one that is invalid or whose model is elsewhere.

    `pruner`: whether the sweep has one.
    """
    pace = _pace(found, runs)
    first: dict[Path, int] = {}
    rows, reasons = [], []
    for place, (words, one, run) in enumerate(zip(differing(points), found, runs, strict=True), 1):
        if isinstance(one, Refused):
            rows.append((words, "invalid", *("-" for _ in HEADER[2:])))
            reasons.append(f"invalid: {words}: {_short(one)}")
            continue
        plan = one.plan
        if run is not None and first.setdefault(run.folder, place) != place:
            rows.append((words, f"the same run as point {first[run.folder]}", *("-" for _ in HEADER[2:])))
            continue
        seconds = pace.get(plan.parameters)
        rows.append(
            (
                words,
                "new" if run is None else describe(run, pruner=pruner),
                size(plan.peak_memory_bytes),
                f"{plan.steps}",
                f"{plan.tokens:,}",
                size(plan.disk_bytes),
                duration(seconds and seconds * plan.tokens),
            )
        )
    told = lines(HEADER, rows) + reasons
    plans = [one.plan for one in found if isinstance(one, Checked)]
    return told + list(
        dict.fromkeys(plan.notes[name] for plan in plans for name in STANDS_IN if name in plan.notes)
    )


def whereabouts(one: Checked | Refused) -> Run | None:
    """The run of a point where it has been placed or would be; `None` where that cannot be known here."""
    if isinstance(one, Refused) or not one.content or one.config.run.resume == "never":
        return None  # the last gets a folder of its own
    return Run(Path(one.config.run.root) / run_id(one.config.tree, one.content))


def describe(run: Run, *, pruner: bool) -> str:
    """The state of a run, and what will be done about it. `pruner`: whether the sweep has one."""
    state = run.state()
    if state == "pruned" and pruner:
        return "pruned: skipped"
    if state in ("interrupted", "pruned"):
        checkpoint = run.last_checkpoint()
        after = f" after step {checkpoint.name.rpartition('-')[2]}" if checkpoint else " from its first step"
        return f"{state}: resumes{after}"
    return STATES.get(state, state)


def _pace(found: Sequence[Checked | Refused], runs: Sequence[Run | None]) -> dict[int, float]:
    """Seconds for each planned token, by size of model, of finished runs of these points, evaluation left out."""
    totals: dict[int, tuple[float, int]] = {}
    measured = 0
    for one, run in zip(found, runs, strict=True):
        if isinstance(one, Refused) or run is None or measured == MEASURED or run.state() != "finished":
            continue
        measured += 1
        seconds, before = 0.0, 0
        for line in run.lines():
            if line.get("tokens_per_s"):
                seconds += (line["tokens"] - before) / line["tokens_per_s"]
                before = line["tokens"]
        if seconds:
            sum_s, tokens = totals.get(one.plan.parameters, (0.0, 0))
            totals[one.plan.parameters] = (sum_s + seconds, tokens + one.plan.tokens)
    return {size: seconds / tokens for size, (seconds, tokens) in totals.items() if tokens}


def _short(refused: Refused) -> str:
    first = refused.problems[0]
    where = first.key if first.value is None else f"{first.key}={first.value}"
    return f"{where}: {first.why}"
