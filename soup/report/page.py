"""The report as one HTML page: it holds its library, its data and its style, and asks nothing of any network.

Nothing that a run says is trusted: the template engine escapes it, what scripts read travels as base64, and the
page's own policy lets no other script run and no request leave.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soup import sweep as sweeps
from soup.cli.table import number as rounded
from soup.cli.table import size
from soup.report.axes import Axis, axis, key_axis
from soup.report.content import Content
from soup.report.curves import curves
from soup.report.keys import shown, value
from soup.report.point import Point
from soup.report.versions import reproduce

FOLDER = Path(__file__).parent / "page"
LIMIT_BYTES = 6_000_000


@dataclass(frozen=True)
class Detail:
    """How much of many runs one page holds. `budget`: drawn points of a metric; `sections`: runs shown in full."""

    budget: int
    sections: int


# Of each report the first that fits.
DETAILS = (Detail(20_000, 1000), Detail(15_000, 1000), Detail(10_000, 400), Detail(5_000, 100), Detail(0, 20))


@dataclass(frozen=True)
class Cell:
    """`sort`: what the column sorts by: a number or a text; nothing goes last."""

    text: str
    sort: Any = None
    number: bool = False
    badge: bool = False


@dataclass(frozen=True)
class Row:
    point: Point
    cells: tuple[Cell, ...]
    best: bool


def page(content: Content) -> str:
    """The page, in as much detail as its size allows."""
    for detail in DETAILS:
        text = _page(content, detail)
        if len(text.encode()) <= LIMIT_BYTES:
            break
    return text


def _page(content: Content, detail: Detail) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    engine = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters |= {"size": size, "rounded": rounded, "shown": shown}
    shown_in_full = _in_full(content, detail.sections)
    return engine.get_template("page.html").render(
        content=content,
        nonce=secrets.token_urlsafe(18),
        style=(FOLDER / "page.css").read_text(encoding="utf-8"),
        script=(FOLDER / "page.js").read_text(encoding="utf-8"),
        library=_packed(get_plotlyjs()),
        data=_packed(json.dumps(_data(content, detail.budget), separators=(",", ":"), allow_nan=False)),
        columns=_columns(content),
        rows=[Row(one, tuple(_cells(content, one)), one is content.best) for one in _sorted(content)],
        largest_first=sweeps.sign(content.objective) < 0,
        in_full=shown_in_full,
        left_out=len(content.points) - len(shown_in_full),
        facts=_facts,
        summaries=_summaries(content),
        reproduce=reproduce,
    )


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _data(content: Content, budget: int) -> dict[str, Any]:
    """What page.js draws: points, curves by metric, axes of the parallel coordinates."""
    ranks = {point.id: place for place, point in enumerate(content.ranked)}
    return {
        "metric": content.metric,
        "points": [
            {"id": one.id, "name": one.name[:120], "state": one.state, "rank": ranks.get(one.id)}
            for one in content.points
        ],
        "scored": len(ranks),
        "metrics": list(content.metrics),
        "curves": curves(content.points, content.metrics, budget),
        "parallel": _parallel(content),
    }


def _parallel(content: Content) -> dict[str, Any] | None:
    """Axes of swept keys and the objective, for the points that have its value."""
    points = content.ranked
    if not content.keys or len(points) < 2:
        return None
    axes = [key_axis(points, key) for key in content.keys]
    axes.append(axis(content.metric, [one.value for one in points]))
    return {"ids": [one.id for one in points], "axes": [_axis(one) for one in axes]}


def _axis(one: Axis) -> dict[str, Any]:
    return {
        "label": one.label,
        "values": [float(f"{place:.6g}") for place in one.places],
        "ticks": [at for at, _ in one.ticks],
        "names": [name[:24] for _, name in one.ticks],
    }


def _columns(content: Content) -> list[str]:
    named = ["name"] if _named(content) else []
    return [
        "#",
        *named,
        *content.keys,
        content.metric,
        "state",
        "step",
        "tokens/s",
        "memory planned",
        "memory measured",
        "run",
    ]


def _named(content: Content) -> bool:
    return any(one.settings.get("run.name") for one in content.points)


def _cells(content: Content, point: Point) -> Iterator[Cell]:
    yield Cell(str(point.number), point.number, True)
    if _named(content):
        name = str(point.settings.get("run.name") or "")
        yield Cell(name, name)
    for key in content.keys:
        found = value(point, key)
        number = isinstance(found, int | float) and not isinstance(found, bool)
        yield Cell("" if found is None else shown(found), found if number else shown(found), number)
    own = point.value if point.objective == content.objective else None
    yield Cell("" if own is None else rounded(own), own, True)
    yield Cell(point.state, point.state, badge=True)
    step = "" if point.step is None else f"{point.step}/{point.steps or '?'}"
    yield Cell(step, point.step, True)
    speed = point.tokens_per_s
    yield Cell("" if speed is None else f"{speed:,.0f}", speed, True)
    for count in (point.planned_bytes, point.measured_bytes):
        yield Cell("" if count is None else size(count), count, True)


def _in_full(content: Content, most: int) -> list[Point]:
    """Points that get a section of their own: what failed and the best before the rest, in their order."""
    if len(content.points) <= most:
        return list(content.points)
    chosen = [*content.ranked[: most // 2], *content.failures, *content.ranked, *content.points]
    kept = set(list(dict.fromkeys(one.id for one in chosen))[:most])
    return [one for one in content.points if one.id in kept]


def _facts(point: Point) -> list[tuple[str, str]]:
    """What is told of a run beside its settings."""
    told = [("folder", str(point.run.folder)), ("state", point.state)]
    if point.step is not None:
        told.append(("step", f"{point.step} of {point.steps or '?'}"))
    if begun := point.environment.get("time"):
        told.append(("begun", f"{begun} on {point.environment.get('host', '-')}"))
    if ended := point.result.get("time"):
        told.append(("ended", str(ended)))
    if back := point.result.get("rollbacks"):
        told.append(("rollbacks", str(back)))
    planned, measured = point.planned_bytes, point.measured_bytes
    if planned or measured:
        told.append(("memory", f"planned {size(planned)}, measured {size(measured)}"))
    numbers = {
        key: one
        for key, one in point.result.items()
        if isinstance(one, int | float)
        and not isinstance(one, bool)
        and key not in ("step", "steps", "rollbacks", "peak_memory_bytes")
    }
    if numbers:
        told.append(("last values", ", ".join(f"{key} {rounded(one)}" for key, one in numbers.items())))
    return told


def _summaries(content: Content) -> dict[str, str]:
    """What each figure shows, in words, for those who do not see it."""
    best, ranked = content.best, content.ranked
    drawn = sum(bool(one.lines) for one in content.points)
    told = {"curves": f"Logged metrics of {drawn} of {len(content.points)} runs."}
    if best is not None and best.value is not None:
        told["curves"] += f" The best {content.metric} is {rounded(best.value)}, of {best.name}."
    if len(ranked) > 1:
        worst = ranked[-1]
        told["parallel"] = (
            f"One line for each of {len(ranked)} {_which(content)}, through its keys' values to its {content.metric}: "
            f"from {rounded(ranked[0].value)} ({ranked[0].name}) to {rounded(worst.value)} ({worst.name}). "
            "The table of points has the same numbers."
        )
    return told


def _sorted(content: Content) -> list[Point]:
    """As the table begins: by the objective, the best first; what has no value in its own order, last."""
    goal = content.objective
    return sorted(content.points, key=lambda one: one.rank if one.objective == goal else math.inf)


def _which(content: Content) -> str:
    return "finished points" if all(one.state == "finished" for one in content.ranked) else "points"


def write(content: Content, path: Path) -> int:
    """Writes the page whole or not at all; returns its size in bytes."""
    from soup import record

    text = page(content)
    record.write(path, text)
    return len(text.encode())


__all__: Sequence[str] = ("page", "write")
