"""Values of a key as places on an axis: numbers, their logarithms where they span a decade, or names in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from soup.report.keys import shown, value
from soup.report.point import Point, number

TICKS = 8
DECADE = 10.0
APART = 0.06  # of an axis


@dataclass(frozen=True)
class Axis:
    """`places`: one for each point. `ticks`: places that are labelled, with their labels."""

    label: str
    places: tuple[float, ...]
    ticks: tuple[tuple[float, str], ...]


def key_axis(points: Sequence[Point], key: str) -> Axis:
    return axis(key, [value(point, key) for point in points])


def axis(label: str, values: Sequence[object]) -> Axis:
    """Numbers keep their distances; anything else stands at even ones."""
    if values and all(number(one) for one in values):
        return _numbers(label, [float(one) for one in values])  # type: ignore[arg-type]
    names = sorted({shown(one) for one in values}, key=_natural)
    place = {name: float(at) for at, name in enumerate(names)}
    step = max(1, math.ceil(len(names) / (2 * TICKS)))
    ticks = tuple((place[name], name) for name in names[::step])
    return Axis(label, tuple(place[shown(one)] for one in values), ticks)


def _numbers(label: str, values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    log = low > 0 and high / low >= DECADE
    places = tuple(math.log10(one) for one in values) if log else tuple(values)
    distinct = sorted(set(zip(places, values, strict=True)))
    if len(distinct) > TICKS:
        ends = (min(places), max(places))
        at = [ends[0] + (ends[1] - ends[0]) * part / 4 for part in range(5)]
        return Axis(label, places, tuple((one, f"{10**one if log else one:.3g}") for one in at))
    ticks: list[tuple[float, str]] = []
    for place, one in reversed(distinct):  # labels that would lie over one another are left out, the ends not
        if not ticks or ticks[-1][0] - place >= APART * (max(places) - min(places)):
            ticks.append((place, f"{one:.4g}"))
    if ticks[-1][0] != distinct[0][0]:
        ticks[-1] = (distinct[0][0], f"{distinct[0][1]:.4g}")
    return Axis(label, places, tuple(ticks))


def _natural(name: str) -> tuple[float, str]:
    """`8` before `16`, and numbers before words."""
    try:
        return float(name), name
    except ValueError:
        return math.inf, name
