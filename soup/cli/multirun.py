"""A sweep from its checked points to its results: the table of points, the record on disk, the launcher, the tables."""

from __future__ import annotations

import math
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from soup import slurm
from soup import sweep as sweeps
from soup.cli import points as before
from soup.cli.check import Checked, admitted
from soup.cli.compose import Point, differing
from soup.cli.status import error
from soup.cli.table import lines, number, size
from soup.errors import Problem, Refused
from soup.record import Run, run_id
from soup.sweep import Sweep, SweepPoint, metric, sign

FAILED = 1  # exit status
PLANNED = ("peak_memory_bytes", "disk_bytes", "steps", "tokens", "parameters")
Say = Callable[[str], None]


def multirun(
    points: Sequence[Point],
    found: Sequence[Checked | Refused],
    args: Namespace,
    settle: Callable[[Checked], Run],
    say: Say,
) -> int:
    """Shows all points, then runs those that are not finished; returns the exit status."""
    from soup.cli.loader import launcher

    ready = admit(points, found, args, say)
    root = Path(ready[0].config.run.root).absolute()
    kept = {one.folder for one in sweeps.every(root)} | {path.parent for path in root.glob("*/config.yaml")}
    runs = [settle(one) if isinstance(one, Checked) else None for one in found]
    for line in before.table(points, found, runs, pruner=args.pruner is not None):
        say(line)
    sweep = _record(points, found, runs, args)
    say(f"\nsweep {sweep.id}: {_counts(sweep.states().values())}")
    _say_costs(ready, [run for run in runs if run is not None], say)
    launch = ready[0].config.tree["launch"]
    try:
        status = launcher(launch["name"]).start(sweep, say)
    except Refused:
        _withdraw(sweep, kept)
        raise
    if launch.get("dry_run"):
        return status
    if not launch["wait"]:
        say(f"`soup status {sweep.id}` shows how it goes; also: logs, cancel, retry")
        return status
    ended = results(sweep, say)
    return status or ended


def admit(
    points: Sequence[Point], found: Sequence[Checked | Refused], args: Namespace, say: Say
) -> list[Checked]:
    """The points that can work.

    Raises:
        Refused: some cannot, and are not to be left out; the table of all has been shown.
    """
    try:
        ready = admitted(points, found)
        alike(ready)
    except Refused:
        elsewhere = [before.whereabouts(one) for one in found]
        for line in before.table(points, found, elsewhere, pruner=args.pruner is not None):
            say(line)
        raise
    return ready


def results(sweep: Sweep, say: Say) -> int:
    """Says what the runs came to, by the sweep's objective, and what failed; returns 1 where one is not finished."""
    objective, good = sweep.objective, sweep.done
    name = metric(objective)
    listed = []
    for point in sweep.points():
        run = sweep.run(point)
        state, result = run.look()
        listed.append((point, run, state, result or {}))
    done = [one for one in listed if one[2] in good]
    done.sort(key=lambda one: (one[2] != "finished", rank(one[3], objective)))
    columns = dict.fromkeys((name, "step", "loss", "eval_loss"))
    first = "smallest" if sign(objective) > 0 else "largest"
    say(f"\nby {name}, {first} first:" if done else "\nno point finished")
    rows = [
        (
            point.words,
            run.id,
            "" if state == "finished" else state,
            *(number(last.get(key)) for key in columns),
        )
        for point, run, state, last in done
    ]
    for line in lines(("point", "run", "", *columns), rows) if rows else ():
        say(line)
    if done and all(name not in one[3] for one in done):
        logged = sorted(key for key, value in done[0][3].items() if isinstance(value, int | float))
        say(f"no point logged {name}; run.objective may be one of: {', '.join(logged)}")
    left = [one for one in listed if one[2] not in good]
    if left:
        say(f"\n{len(left)} of {len(listed)} points did not finish:")
        for line in lines(
            ("point", "run", "state", "error"),
            [(point.words, run.id, state, error(run, state, last)) for point, run, state, last in left],
        ):
            say(line)
    return FAILED if left else 0


def rank(last: Mapping[str, Any], objective: str) -> float:
    """Where a run stands among others: its objective, or behind all where it has none."""
    value = last.get(metric(objective))
    known = isinstance(value, int | float) and not math.isnan(value)
    return sign(objective) * value if known else math.inf  # type: ignore[operator]


def alike(ready: Sequence[Checked]) -> None:
    """What a sweep has one of."""
    problems = []
    for key in ("root", "objective"):
        values = {getattr(one.config.run, key): None for one in ready}
        if len(values) > 1:
            why = f"one sweep has one, and this has {' and '.join(values)}"
            problems.append(Problem(key=f"run.{key}", why=why, fix=f"sweep each run.{key} on its own"))
    # A run's id leaves out over how many processes it is spread.
    for name in ("processes", "nodes"):
        if len({one.config.tree["distributed"][name] for one in ready}) == 1:
            continue
        first: dict[str, int] = {}
        for one in ready:
            if not one.content or one.config.run.resume == "never":
                continue
            asked = one.config.tree["distributed"][name]
            if (there := first.setdefault(run_id(one.config.tree, one.content), asked)) != asked:
                why = f"another point is the same run for {there}, and a run has one number"
                fix = "run.resume=never, by which each has a folder of its own"
                problems.append(Problem(key=f"distributed.{name}", value=asked, why=why, fix=fix))
    if problems:
        raise Refused(problems)


def _record(
    points: Sequence[Point],
    found: Sequence[Checked | Refused],
    runs: Sequence[Run | None],
    args: Namespace,
) -> Sweep:
    listed: dict[str, SweepPoint] = {}  # of points that are one run, the first
    invalid = []
    settings: dict[str, Any] = {}
    for words, point, one, run in zip(differing(points), points, found, runs, strict=True):
        if isinstance(one, Refused):
            invalid.append({"overrides": words.split(), "why": str(one)})
            continue
        planned, launch = one.plan.to_dict(), one.config.tree["launch"]
        settings = settings or dict(launch)
        listed.setdefault(
            run.id,
            SweepPoint(
                run=run.id,
                overrides=tuple(words.split(" ")) if words else point.overrides,
                planned={key: planned[key] for key in PLANNED},
                launch={key: value for key, value in launch.items() if settings.get(key) != value},
            ),
        )
        config = one.config
    return sweeps.record(
        Path(config.run.root).absolute(),
        command=args.argv,
        settings=settings,
        objective=config.run.objective,
        pruner=args.pruner,
        points=list(listed.values()),
        invalid=invalid,
    )


def _withdraw(sweep: Sweep, kept: set[Path]) -> None:
    """Removes what was written for a sweep that its launcher refuses, unless some of its jobs are submitted.

    `kept`: folders that were there before.
    """
    if any(one.record()["job"] for one in slurm.submissions(sweep)):
        return
    for run in map(sweep.run, sweep.points()):
        if run.folder not in kept and run.state() == "new":
            shutil.rmtree(run.folder)
    if sweep.folder not in kept:
        shutil.rmtree(sweep.folder)


def _say_costs(ready: Sequence[Checked], runs: Sequence[Run], say: Say) -> None:
    """Memory of all that train at a time, and disk, that do not suffice: said, not refused, since they are predictions
    (soup.cli.check refuses a point that is far too large alone)."""
    import psutil

    from soup.device import slots

    disk = sum({run.folder: one.plan.disk_bytes for one, run in zip(ready, runs, strict=True)}.values())
    free = shutil.disk_usage(runs[0].folder).free
    if disk > free:
        say(f"disk: the points take {size(disk)}, and {size(free)} are free")
    at_a_time = slots(ready[0].config.launch.slots, ready[0].device)
    if ready[0].device.kind == "cpu" and ready[0].config.launch.slurm is None:
        largest = sorted((one.plan.peak_memory_bytes for one in ready), reverse=True)[:at_a_time]
        there = psutil.virtual_memory().total
        if sum(largest) > there:
            say(
                f"memory: {len(largest)} at a time may take {size(sum(largest))}, and this machine has {size(there)}"
            )


def _counts(states: Any) -> str:
    counted: dict[str, int] = {}
    for state in states:
        counted[state] = counted.get(state, 0) + 1
    return ", ".join(f"{count} {state}" for state, count in counted.items())
