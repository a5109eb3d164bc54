"""`soup status --watch` on a terminal: a sweep as it goes, in as much width and height as there is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from soup.cli.table import number
from soup.record import DONE

STYLES = {
    "finished": "green",
    "pruned": "yellow",
    "running": "bold cyan",
    "queued": "cyan",
    "failed": "bold red",
    "diverged": "bold red",
    "interrupted": "yellow",
}
NARROW, ROOMY = 72, 100  # columns, from which on there is room for bars and for the runs' ids
HEAD = 4  # lines above the rows, and
FOOT = 2  # below them
ERRORS = 3  # that are quoted, where there are as many lines as
TALL = 18
URGENT = ("running", "failed", "diverged", "interrupted", *DONE, "queued", "waiting", "new")

Found = Mapping[str, Any]


def watch(look: Callable[[], Found], going: Callable[[Found], bool], every_s: float) -> Found:
    """Shows what `look` finds until nothing goes on any more; returns the last. The terminal is then as it was."""
    console = Console(highlight=False)
    found = look()
    if not going(found):
        return found
    live = Live(view(found, *console.size), console=console, screen=True, auto_refresh=False)
    try:  # and no `with`: Ctrl-C while it begins would leave the terminal on its second screen
        live.start(refresh=True)
        while going(found):
            time.sleep(every_s)
            found = look()
            live.update(view(found, *console.size), refresh=True)
    finally:
        live.stop()
    return found


def capable(console: Console) -> bool:
    """Whether the terminal can be drawn over: a pipe cannot, nor one that says it is dumb."""
    return console.is_terminal and not console.is_dumb_terminal


def view(found: Found, width: int, height: int) -> RenderableType:
    """Counts, how far the whole is, and a row a point; where not all fit, what needs attention and the best."""
    told = [one for one in found["points"] if one.get("error")]  # of one that is queued, why it waits
    bad = [one for one in told if one["state"] != "queued"]
    errors = (bad or told)[-ERRORS:] if height >= TALL else []
    room = max(1, height - HEAD - FOOT - (len(errors) + 1 if errors else 0))
    shown = _fitting(found["points"], room)
    left_out = len(found["points"]) - len(shown) + found["left_out"]
    parts: list[RenderableType] = [
        _title(found, width),
        _progress(found, width),
        Text(),
        _rows(found, shown, width),
    ]
    if left_out:
        parts.append(Text(f"and {left_out} more points", style="dim"))
    if errors:
        parts.append(Text())
        style = "red" if bad else "dim"
        parts += [_line(f"{one['number']} {one['error']}", width, style) for one in errors]
    parts.append(_line(_foot(found), width, "dim"))
    return Group(*parts)


def _title(found: Found, width: int) -> Text:
    line = Text.assemble(("sweep ", "dim"), (found["id"], "bold"), "  ")
    for state, count in found["counts"].items():
        line.append(f"{count} {state}  ", STYLES.get(state, ""))
    line.truncate(width, overflow="ellipsis")
    return line


def _progress(found: Found, width: int) -> RenderableType:
    """Finished points, and of each that runs the part of its steps that it has done."""
    total = sum(found["counts"].values())
    done = sum(count for state, count in found["counts"].items() if state in DONE)
    part = sum(_part(one) for one in found["points"] if one["state"] == "running")
    told = f" {done} of {total} points done"
    bar = ProgressBar(total=total, completed=done + part, width=max(10, width - len(told) - 1))
    grid = Table.grid()
    grid.add_row(bar, told)
    return grid


def _part(one: Mapping[str, Any]) -> float:
    return min(1.0, one["step"] / one["steps"]) if one.get("step") and one.get("steps") else 0.0


def _rows(found: Found, shown: Sequence[Mapping[str, Any]], width: int) -> Table:
    objective = found["objective"]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", width=width)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("point", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("state", no_wrap=True)
    table.add_column("step", justify="right", no_wrap=True)
    if width >= NARROW:
        table.add_column("", width=10, no_wrap=True)
    table.add_column(objective, justify="right", no_wrap=True, max_width=12, overflow="ellipsis")
    if width >= ROOMY:
        table.add_column("run", no_wrap=True)
    brief = _brief([one["point"] for one in found["points"]]) if width < ROOMY else {}
    for one in shown:
        state, begun = one["state"], one.get("step") is not None
        bar = [ProgressBar(total=1, completed=_part(one), width=10) if state == "running" else ""][
            : width >= NARROW
        ]
        table.add_row(
            str(one["number"]),
            Text(_named(one["point"], brief)),
            Text(state, style=STYLES.get(state, "dim")),
            f"{one['step']}/{one['steps']}" if begun else "",
            *bar,
            "" if one.get(objective) is None else number(one[objective]),
            *((Text(one["run"], style="dim"),) if width >= ROOMY else ()),
        )
    return table


def _brief(points: Sequence[str]) -> dict[str, str]:
    """Keys by their last parts, where those tell them apart: `lora.r` is `r`."""
    keys = dict.fromkeys(word.partition("=")[0] for point in points for word in point.split(" "))
    leaves = [key.rpartition(".")[2] for key in keys]
    return {key: leaf for key, leaf in zip(keys, leaves, strict=True) if leaves.count(leaf) == 1}


def _named(point: str, brief: Mapping[str, str]) -> str:
    words = [word.partition("=") for word in point.split(" ")]
    return " ".join(f"{brief.get(key, key)}{sign}{value}" for key, sign, value in words)


def _fitting(points: Sequence[Mapping[str, Any]], room: int) -> list[Mapping[str, Any]]:
    """As many as there are lines for, in their order: what runs, then what ended badly, then the rest."""
    if len(points) <= room:
        return list(points)
    order = {state: place for place, state in enumerate(URGENT)}
    ranked = sorted(points, key=lambda one: order.get(one["state"], len(order)))
    kept = {one["number"] for one in ranked[:room]}
    return [one for one in points if one["number"] in kept]


def _foot(found: Found) -> str:
    pids = ", ".join(f"process {one['pid']} on {one['host']}" for one in found["processes"])
    who = f"{pids} runs it" if pids else f"launch={found['launch']}"
    return f"{found['silent'] or who}; Ctrl-C stops watching, not the sweep"


def _line(text: str, width: int, style: str) -> Text:
    line = Text(" ".join(text.split()), style=style, no_wrap=True)
    line.truncate(width, overflow="ellipsis")
    return line
