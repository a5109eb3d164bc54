"""The report as one PNG, for where no page opens: curves, parallel coordinates, importance and the best points."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soup.cli.table import number as rounded
from soup.report.axes import Axis, axis, key_axis
from soup.report.content import Content
from soup.report.curves import curves
from soup.report.point import Point

FEW = 10
DPI = 110
BUDGET = 60_000  # drawn points of a metric
INK, SOFT, GRID, ACCENT, NONE = "#1b1f27", "#5a6372", "#e8ebf0", "#1f5fd0", "#adb5bd"
# As the page has them.
EACH = [
    "#1f5fd0",
    "#d9480f",
    "#2b8a3e",
    "#862e9c",
    "#0b7285",
    "#c2255c",
    "#846200",
    "#495057",
    "#5f3dc4",
    "#66a80f",
]
STEPS = ["#2d0a56", "#3b2f80", "#31598c", "#26778e", "#1f938b", "#35b07a", "#74c465", "#b3cf52"]
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a run's name is no formula
    "axes.edgecolor": GRID,
    "axes.labelcolor": SOFT,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "figure.facecolor": "white",
}


def write(content: Content, path: Path) -> None:
    """Draws without a display, and replaces the file in one step."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing"
        )  # a name in a script that the font lacks
        figure = Figure(figsize=(13, 8.2), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(_title(content), x=0.012, ha="left", fontsize=12, fontweight="bold")
        grid = figure.subplots(2, 2)
        names = list(content.metrics[:2])
        drawn = curves(content.points, names, BUDGET)
        for place, axes in zip((0, 1), grid[0], strict=True):
            name = names[place] if place < len(names) else None
            _curves(axes, content, name, drawn.get(name, []) if name else [])
        _parallel(grid[1][0], content)
        _importance_or_best(grid[1][1], content)
        partial = path.with_name(f".{path.name}")
        figure.savefig(partial, dpi=DPI, format="png")
        partial.replace(path)


def _title(content: Content) -> str:
    counts = ", ".join(f"{number} {state}" for state, number in content.counts.items())
    best = content.best
    told = f"{content.title}: {counts}"
    if best is not None and best.value is not None:
        told += f"\nbest {content.metric} {rounded(best.value)}: {_cut(best.name, 110)}"
    return told


def _colour(content: Content, point: Point, place: int, rank: dict[str, int]) -> str:
    if len(content.points) <= FEW:
        return EACH[place]
    at = rank.get(point.id)
    return NONE if at is None else STEPS[min(7, 8 * at // len(rank))]


def _curves(axes: Any, content: Content, name: str | None, drawn: Sequence[Any]) -> None:
    axes.set_title(name or "no second metric was logged")
    if name is None:
        axes.axis("off")
        return
    axes.set_xlabel("step")
    rank = {one.id: place for place, one in enumerate(content.ranked)}
    order = sorted(range(len(drawn)), key=lambda place: -rank.get(content.points[place].id, len(drawn)))
    few = len(content.points) <= FEW
    lines: dict[int, Any] = {}
    for place in order:  # the best last, on top
        if drawn[place] is None:
            continue
        steps, _, values = drawn[place]
        point = content.points[place]
        (lines[place],) = axes.plot(
            steps,
            [float("nan") if one is None else one for one in values],
            color=_colour(content, point, place, rank),
            linewidth=1.8 if few else 1.0,
            marker="o" if name.startswith("eval") or len(steps) < 3 else None,
            markersize=3,
            label=_cut(point.name, 40),
        )
    if few and len(lines) > 1 and not name.startswith("eval"):  # one legend is enough
        axes.legend(handles=[lines[place] for place in sorted(lines)], fontsize=7, frameon=False)


def _parallel(axes: Any, content: Content) -> None:
    points = content.ranked
    if not content.keys or len(points) < 2:
        _facts(axes, content)
        return
    axes.set_title(f"keys and {content.metric}")
    columns: list[Axis] = [
        *(key_axis(points, key) for key in content.keys[:7]),
        axis(content.metric, [one.value for one in points]),
    ]
    scaled = [_scaled(one) for one in columns]
    ranks = {one.id: rank for rank, one in enumerate(points)}
    places = {one.id: place for place, one in enumerate(content.points)}
    for rank in range(len(points) - 1, -1, -1):
        colour = _colour(content, points[rank], places[points[rank].id], ranks)
        axes.plot(
            range(len(columns)),
            [one(at.places[rank]) for one, at in zip(scaled, columns, strict=True)],
            color=colour,
            linewidth=1.2,
        )
    for place, (one, scale) in enumerate(zip(columns, scaled, strict=True)):
        axes.axvline(place, color=SOFT, linewidth=0.8)
        for at, told in one.ticks:
            axes.annotate(
                _cut(told, 16),
                (place, scale(at)),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
            )
    axes.set_xticks(range(len(columns)), [_cut(one.label, 22) for one in columns])
    axes.set_xlim(-0.1, len(columns) - 1 + 0.35)
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)


def _scaled(one: Axis) -> Any:
    low, high = min(one.places), max(one.places)
    return lambda at: 0.5 if high == low else (at - low) / (high - low)


def _importance_or_best(axes: Any, content: Content) -> None:
    shares = content.importance.shares[:8]
    if not shares:
        _best(axes, content)
        return
    axes.set_title(f"importance for {content.metric}")
    labels = [_cut(key, 28) for key, _ in reversed(shares)]
    bars = axes.barh(range(len(shares)), [share for _, share in reversed(shares)], color=ACCENT, height=0.55)
    axes.set_yticks(range(len(shares)), labels)
    axes.bar_label(bars, labels=[f" {share:.0%}" for _, share in reversed(shares)], color=SOFT)
    axes.set_xlim(0, 1.1)
    axes.set_xticks([])
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlabel(content.importance.note)


def _best(axes: Any, content: Content) -> None:
    """The best points, or what there are, in lines."""
    ranked = content.ranked or list(content.points)
    axes.set_title(f"by {content.metric}" if content.ranked else "points")
    axes.axis("off")
    for line, point in enumerate(ranked[:10]):
        told = f"{rounded(point.value):>9}   {point.state:11}  {_cut(point.name, 60)}"
        axes.text(
            0, 0.95 - line * 0.085, told, transform=axes.transAxes, family="monospace", fontsize=8, va="top"
        )


def _facts(axes: Any, content: Content) -> None:
    """Of runs with nothing to compare: what the first of them is."""
    point = content.best or content.points[0]
    axes.set_title("run")
    axes.axis("off")
    told = [
        ("id", point.id),
        ("task", point.settings.get("task.name", "-")),
        ("model", Path(str(point.settings.get("model.base", "-"))).name),
        ("state", point.state),
        ("step", f"{point.step or '-'} of {point.steps or '-'}"),
        ("error", point.error.split("\n")[0] or "-"),
    ]
    for line, (name, one) in enumerate(told):
        axes.text(
            0,
            0.95 - line * 0.1,
            f"{name:8}{_cut(str(one), 70)}",
            transform=axes.transAxes,
            family="monospace",
            fontsize=9,
            va="top",
        )


def _cut(text: str, most: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."
