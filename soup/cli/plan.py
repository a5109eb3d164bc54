"""`soup plan [--multirun] [overrides]`: what it would cost; trains nothing."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from soup.cli.check import Checked, admitted, checked, valid
from soup.cli.compose import Point
from soup.cli.multirun import alike
from soup.cli.points import STANDS_IN, table, whereabouts
from soup.cli.table import size
from soup.errors import Refused
from soup.plan import Plan
from soup.record import Run


def plan(points: Sequence[Point], args: Namespace) -> int:
    """Prints the plan of one point, or a table of all points; invalid ones are refused unless told otherwise."""
    if len(points) == 1:
        (one,) = valid(points, train=False)
        print(json.dumps(one.plan.to_dict(), indent=2)) if args.json else _show(one)
        return 0
    found = checked(points, train=False)
    runs = [whereabouts(one) for one in found]
    if args.json:
        rows = [_row(*each) for each in zip(points, found, runs, strict=True)]
        print(json.dumps(rows, indent=2))
    else:
        print("\n".join(table(points, found, runs, pruner=args.pruner is not None)))
    alike(admitted(points, found))  # refuses, with the reasons, unless launch.invalid=skip
    return 0


def _row(point: Point, one: Checked | Refused, run: Run | None) -> dict[str, Any]:
    told: dict[str, Any] = {"overrides": list(point.overrides), "valid": isinstance(one, Checked)}
    if run is not None:
        told |= {"run": run.id, "state": run.state()}
    return told | (one.plan.to_dict() if isinstance(one, Checked) else {"problems": str(one).splitlines()})


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
        ("peak memory", size(p.peak_memory_bytes), p.notes["memory"]),
        *((f"  {name}", size(amount), "") for name, amount in p.memory.items()),
        ("devices", str(p.devices or "none"), p.notes["devices"]),
        *([("context", "", p.notes["context"])] if "context" in p.notes else []),
        *([("host memory", size(p.host_memory_bytes), "offloaded")] if p.host_memory_bytes else []),
        ("disk", size(p.disk_bytes), p.notes["disk"]),
        *((name, "", p.notes[name]) for name in ("packing", "curriculum", *STANDS_IN) if name in p.notes),
    )
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
