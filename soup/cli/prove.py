"""`soup prove [overrides]`: builds the run in a process of its own, and shows requested and effective settings."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from soup import inputs
from soup.cli.check import Checked, valid
from soup.cli.compose import Point
from soup.cli.process import train
from soup.record import place, read_json, write_json


def prove(points: Sequence[Point], args: Namespace) -> int:
    """Returns 0 where every setting of every point took effect, 1 for a mismatch. Writes no run."""
    status = 0
    for one in valid(points, train=True):
        with TemporaryDirectory(prefix="soup-prove-") as folder:
            where = place(Path(folder), "prove", one.config.tree, resume="auto")
            write_json(where.folder / "inputs.json", inputs.content(one.config, one.model_folder))
            code = train(where, "--prove")
            proved = read_json(where.effective)
            if proved is None:
                error = (where.result() or {}).get("error", where.log_tail())
                print(error or f"the process ended with status {code}", file=sys.stderr)
                status = max(status, code if code in (1, 2) else 1)
                continue
        status = max(status, int(not all(effect["ok"] for effect in proved.values())))
        if args.json:
            import json

            print(json.dumps(proved, indent=2))
        else:
            _show(one, proved)
    return status


def show(proved: dict[str, Any], console: Any) -> None:
    """A table of effective.json: key, requested, effective, and where it was read."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("", "key", "requested", "effective", "read from"):
        table.add_column(name, overflow="fold")
    for key, effect in proved.items():
        mark = "[green]ok[/]" if effect["ok"] else "[bold red]MISMATCH[/]"
        table.add_row(mark, key, _word(effect["requested"]), _word(effect["effective"]), effect["how"])
    console.print(table)


def _show(one: Checked, proved: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if one.point.overrides:
        console.print(" ".join(one.point.overrides), style="bold", markup=False)
    show(proved, console)
    wrong = [key for key, effect in proved.items() if not effect["ok"]]
    console.print(
        f"{len(wrong)} settings did not take effect: {', '.join(wrong)}"
        if wrong
        else f"all {len(proved)} settings are in force"
    )


def _word(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
