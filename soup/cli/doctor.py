"""`soup doctor [overrides] [--json]`: what works on this machine, what does not, and what mends it."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from soup import cache
from soup.cli.compose import Point
from soup.device import Device, resolve
from soup.doctor.capabilities import CAPABILITIES, Capability
from soup.doctor.examine import Finding, disk, examine, versions
from soup.errors import Refused
from soup.schema import Config, check

STYLES = {"works": "green", "missing": "yellow", "broken": "red"}
LEAST_BYTES = 1_000_000_000  # a small model's adapters, twice, and the cache's tokens


def doctor(points: Sequence[Point], args: Namespace) -> int:
    """Prints the table; 1 where something is missing or broken that the configuration needs here, else 0."""
    wanted = [(config, resolve(config.launch.device)) for config in (check(point.tree) for point in points)]
    needed = {capability.name for capability in CAPABILITIES if _needed(capability, wanted)}
    needed |= {"disk space", "versions"} | (
        {"Optuna"} if args.pruner is not None or getattr(args, "study", None) else set()
    )
    roots = dict.fromkeys(Path(config.run.root) for config, _ in wanted)
    found = [
        versions(),
        disk([*roots, cache.root()], max(_planned_bytes(point) for point in points)),
        *_examined(quiet=args.json),
    ]
    failed = [one for one in found if one.state != "works" and one.name in needed]
    if args.json:
        listed = [asdict(one) | {"needed": one.name in needed} for one in found]
        print(json.dumps({"ok": not failed, "capabilities": listed}, indent=2))
    else:
        _print(found, needed, failed)
    return 1 if failed else 0


def _needed(capability: Capability, wanted: Sequence[tuple[Config, Device]]) -> bool:
    """Where a job is submitted, only what submits it must be here."""
    return any(
        capability.needed(config, device) and (config.launch.slurm is None or capability.submits)
        for config, device in wanted
    )


def _planned_bytes(point: Point) -> int:
    """Disk that the run is planned to take; where that cannot be planned here, what the least take."""
    from soup.cli.check import checked

    (one,) = checked([point], train=False)
    return LEAST_BYTES if isinstance(one, Refused) else max(LEAST_BYTES, one.plan.disk_bytes)


def _examined(*, quiet: bool) -> list[Finding]:
    if quiet or not sys.stderr.isatty():
        return examine(CAPABILITIES)
    from rich.console import Console

    left = {capability.name for capability in CAPABILITIES}
    with Console(stderr=True).status("") as status:

        def done(finding: Finding) -> None:
            left.discard(finding.name)
            status.update(f"trying {', '.join(sorted(left))}")

        return examine(CAPABILITIES, done=done)


def _print(found: Sequence[Finding], needed: set[str], failed: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    console: Any = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in ("capability", "state", "needed", ""):
        table.add_column(column, overflow="fold", no_wrap=column != "")
    for one in found:
        style = STYLES[one.state]
        state = f"[{style}]{one.state}[/{style}]"
        detail = one.detail.replace("; ", "\n").replace("[", "\\[")
        table.add_row(one.name, state, "yes" if one.name in needed else "", detail)
    console.print(table)
    mends = [one for one in found if one.mend]
    if mends:
        console.print("\nWhat would mend it")
    for one in mends:
        console.print(f"  {one.name}\n      {one.mend}", markup=False, soft_wrap=True)
    if failed:
        names = ", ".join(one.name for one in failed)
        console.print(f"\nthis configuration needs what is not here: {names}", style="red")
