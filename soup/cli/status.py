"""`soup status [SWEEP] [--watch]`: where the points of a sweep stand, from files alone."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soup import parents, slurm
from soup import sweep as sweeps
from soup.cli.table import lines, number
from soup.errors import Problem, Refused
from soup.record import Run
from soup.sweep import Sweep, SweepPoint, metric, sign

SHOWN = 50  # points; of more only what runs, what failed, and the best
BEST = 10
BAD = ("failed", "diverged", "interrupted")
WATCH_S = 2.0


def status(words: list[str], args: Namespace) -> int:
    """Prints a line for each point; with --watch as they change, until nothing runs any more."""
    if len(words) > 1:
        raise Refused(
            Problem(key="status", value=" ".join(words), why="one sweep at a time", fix="status SWEEP")
        )
    sweep = sweeps.find(Path(args.run_root).absolute(), *words)
    if args.watch and not args.json and sys.stdout.isatty():
        from rich.console import Console

        from soup.cli import watch

        if watch.capable(Console()):
            found = watch.watch(lambda: look(sweep, whole=False), _active, WATCH_S)
            print("\n".join(_text(found)), flush=True)
            return 0
    before = None
    while True:
        found = look(sweep, whole=args.json)
        if found != before:  # into a pipe, and on a terminal that cannot be drawn over, what has changed
            told = json.dumps(found, indent=2) if args.json else "\n".join(_text(found))
            print(told, flush=True)
        if not args.watch or not _active(found):
            return 0
        before = found
        time.sleep(WATCH_S)


def look(sweep: Sweep, *, whole: bool = True) -> dict[str, Any]:
    """The sweep as it stands: id, launch, created, objective, counts by state, processes, points.

    Without `whole`, of many points only those that run, that ended badly, and the best.
    """
    record = sweep.record()
    there, objective = parents.alive(sweep), metric(record["objective"])
    points = sweep.points()
    looks = [sweep.run(point).look() for point in points]
    names = ["waiting" if state == "new" and there else state for state, _ in looks]
    told: dict[str, tuple[str, str]] = {}
    silent = None
    if record["launch"] == "slurm":
        try:
            told = slurm.tell(
                sweep, {point.run: state for point, (state, _) in zip(points, looks, strict=True)}
            )
        except Refused as refused:
            silent = refused.problems[0].why
    names = [
        told[point.run][0] if point.run in told else name for point, name in zip(points, names, strict=True)
    ]
    chosen = range(len(points)) if whole or len(points) <= SHOWN else _chosen(looks, record["objective"])
    return {
        "id": sweep.id,
        "launch": record["launch"],
        "created": record["created"],
        "objective": objective,
        "processes": there,
        "silent": silent,
        "counts": dict(Counter(names)),
        "invalid": len(record["invalid"]),
        "left_out": len(points) - len(chosen),
        "points": [
            {
                "number": place + 1,
                "point": points[place].words,
                "run": points[place].run,
                "state": names[place],
            }
            | _details(sweep.run(points[place]), points[place], *looks[place], objective)
            | ({"error": told[points[place].run][1]} if points[place].run in told else {})
            for place in chosen
        ],
    }


def _details(
    run: Run, point: SweepPoint, state: str, result: dict[str, Any] | None, objective: str
) -> dict[str, Any]:
    if state == "new":
        return {}
    last = result or sweeps.last_metrics(run, objective)
    told = {"step": last.get("step"), "steps": last.get("steps", point.planned.get("steps"))}
    told[objective] = last.get(objective)
    if state in (*BAD, "pruned"):
        told["error"] = error(run, state, last)
    return told


def error(run: Run, state: str, result: dict[str, Any]) -> str:
    """The line that says why a run did not finish: the recorded error, or the end of the log of one that was killed."""
    told = str(result.get("error", "")).splitlines()
    return told[0] if told else run.log_tail() if state == "interrupted" else ""


def _active(found: dict[str, Any]) -> bool:
    return bool(found["processes"]) or not {"running", "queued"}.isdisjoint(found["counts"])


def _text(found: dict[str, Any]) -> Iterator[str]:
    counts = ", ".join(f"{count} {state}" for state, count in found["counts"].items())
    pids = ", ".join(f"process {one['pid']} on {one['host']}" for one in found["processes"])
    yield f"sweep {found['id']} (launch={found['launch']}, {found['created']}): {counts}"
    if found["invalid"]:
        yield f"{found['invalid']} invalid points were left out"
    if found["launch"] == "local":
        yield f"{pids} runs it" if pids else "no process runs it"
    if found["silent"]:
        yield f"{found['silent']}: this is what the files of the runs say"
    objective = found["objective"]
    rows = [
        (
            one["number"],
            one["point"],
            one["state"],
            one["run"],
            _step(one),
            _value(one, objective),
            one.get("error", ""),
        )
        for one in found["points"]
    ]
    yield from lines(("", "point", "state", "run", "step", objective, "error"), rows)
    if found["left_out"]:
        yield f"and {found['left_out']} more points; --json lists all"


def _chosen(looks: list[tuple[str, dict[str, Any] | None]], objective: str) -> list[int]:
    """Places of the points that run, that ended badly, and of the best."""

    def those(*states: str) -> list[int]:
        return [place for place, (state, _) in enumerate(looks) if state in states][:SHOWN]

    name = metric(objective)
    scored = [
        (sign(objective) * result[name], place)
        for place, (state, result) in enumerate(looks)
        if state == "finished" and isinstance(result.get(name), int | float)
    ]
    return [*those("running"), *those(*BAD), *(place for _, place in sorted(scored)[:BEST])]


def _step(one: dict[str, Any]) -> str:
    return "" if one.get("step") is None else f"{one['step']}/{one['steps']}"


def _value(one: dict[str, Any], objective: str) -> str:
    return "" if one.get(objective) is None else number(one[objective])
