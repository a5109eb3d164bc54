"""`soup plan [--multirun] [overrides]`: what it would cost; trains nothing."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from soup.cli.check import Checked, checked, valid
from soup.cli.compose import Point, differing
from soup.errors import Refused
from soup.plan import Plan

STANDS_IN = ("model", "lengths")  # notes of a plan for a model that is not on this machine


def plan(points: Sequence[Point], args: Namespace) -> int:
    """Prints the plan of one point, or a table of all points; invalid ones are refused unless told otherwise."""
    if len(points) == 1:
        (one,) = valid(points, train=False)
        print(json.dumps(one.plan.to_dict(), indent=2)) if args.json else _show(one)
        return 0
    found = checked(points, train=False)
    if args.json:
        print(json.dumps([_row(point, one) for point, one in zip(points, found, strict=True)], indent=2))
    else:
        _table(points, found)
    bad = [one for one in found if isinstance(one, Refused)]
    if bad:
        valid(points, train=False)  # refuses, with the reasons, unless launch.invalid=skip
    return 0


def _row(point: Point, one: Checked | Refused) -> dict[str, Any]:
    told: dict[str, Any] = {"overrides": list(point.overrides), "valid": isinstance(one, Checked)}
    return told | (one.plan.to_dict() if isinstance(one, Checked) else {"problems": str(one).splitlines()})


def _table(points: Sequence[Point], found: Sequence[Checked | Refused]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("point", "valid", "memory", "steps", "tokens", "disk"):
        table.add_column(name, overflow="fold")
    for words, one in zip(differing(points), found, strict=True):
        if isinstance(one, Refused):
            table.add_row(words, "no", *("-" for _ in range(4)))
        else:
            p = one.plan
            table.add_row(
                words, "yes", _bytes(p.peak_memory_bytes), str(p.steps), f"{p.tokens:,}", _bytes(p.disk_bytes)
            )
    console = Console(highlight=False)
    console.print(table)
    plans = [one.plan for one in found if isinstance(one, Checked)]
    for note in dict.fromkeys(plan.notes[name] for plan in plans for name in STANDS_IN if name in plan.notes):
        console.print(note, markup=False)


def _show(one: Checked) -> None:
    from rich.console import Console
    from rich.table import Table

    p: Plan = one.plan
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    rows = (
        ("device", one.device.kind, one.device.reason),
        ("parameters", f"{p.parameters:,}", p.notes["parameters"]),
        ("trained", f"{p.trainable:,}", p.notes["trainable"]),
        ("weights in", p.dtype, p.notes["dtype"]),
        ("rows a step", str(p.rows_per_step), p.notes["rows_per_step"]),
        ("tokens a step", f"{p.tokens_per_step:,}", p.notes["tokens_per_step"]),
        ("steps", f"{p.steps:,}", p.notes["steps"]),
        ("tokens", f"{p.tokens:,}", "sampled: from the first rows" if p.sampled else "not counting padding"),
        ("peak memory", _bytes(p.peak_memory_bytes), p.notes["memory"]),
        *((f"  {name}", _bytes(size), "") for name, size in p.memory.items()),
        ("devices", str(p.devices or "none"), p.notes["devices"]),
        *([("context", "", p.notes["context"])] if "context" in p.notes else []),
        *([("host memory", _bytes(p.host_memory_bytes), "offloaded")] if p.host_memory_bytes else []),
        ("disk", _bytes(p.disk_bytes), p.notes["disk"]),
        *((name, "", p.notes[name]) for name in ("packing", "curriculum", *STANDS_IN) if name in p.notes),
    )
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def _bytes(size: float) -> str:
    from rich.filesize import decimal

    return decimal(round(size))
