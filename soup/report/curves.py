"""Curves of logged metrics, few enough points each that hundreds of runs can be drawn and read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from soup.report.point import Point, number

# What is a place on the axis, or how long an evaluation took.
NOT_DRAWN = (
    "step",
    "steps",
    "epoch",
    "tokens",
    "eval_num_tokens",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
)
FIRST = ("loss", "eval_loss", "reward", "eval_reward", "grad_norm", "lr", "tokens_per_s", "peak_memory_bytes")
METRICS = 14
LEAST = 24  # points of a curve, however many there are

Curve = tuple[list[int], list[int | None], list[float | None]]  # steps, tokens, values; `None` is a gap


def metrics(points: Sequence[Point]) -> list[str]:
    """Names of what can be drawn, the usual ones first."""
    found = {
        key
        for point in points
        for line in point.lines
        for key, value in line.items()
        if key not in NOT_DRAWN and isinstance(value, int | float) and not isinstance(value, bool)
    }
    usual = [name for name in FIRST if name in found]
    return [*usual, *sorted(found - set(usual))][:METRICS]


def curves(points: Sequence[Point], names: Sequence[str], budget: int) -> dict[str, list[Curve | None]]:
    """For each metric a curve of each point, or `None`. `budget`: points of all curves of a metric together."""
    most = max(LEAST, budget // max(1, len(points)))
    return {name: [_curve(point, name, most) for point in points] for name in names}


def _curve(point: Point, name: str, most: int) -> Curve | None:
    steps: list[int] = []
    tokens: list[int | None] = []
    values: list[float | None] = []
    seen = None
    for line in point.lines:
        seen = line.get("tokens", seen)  # a line of an evaluation has none of its own
        step, value = line.get("step"), line.get(name)
        if not number(step) or not isinstance(value, int | float):
            continue
        steps.append(step)
        tokens.append(seen if number(seen) else None)
        values.append(_short(value))
    if not steps:
        return None
    kept = thinned(values, most)
    return [steps[i] for i in kept], [tokens[i] for i in kept], [values[i] for i in kept]


def thinned(values: Sequence[float | None], most: int) -> list[int]:
    """Places of at most `most` values: of each stretch its least and its greatest, so that no spike is lost.

    The first and the last stay, and so does a gap in each stretch that has one.
    """
    count = len(values)
    if count <= most:
        return list(range(count))
    kept = {0, count - 1}
    stretches = max(1, (most - 2) // 3)
    for number_ in range(stretches):
        places = range(1 + number_ * (count - 2) // stretches, 1 + (number_ + 1) * (count - 2) // stretches)
        drawn = [place for place in places if values[place] is not None]
        if drawn:
            kept |= {min(drawn, key=values.__getitem__), max(drawn, key=values.__getitem__)}
        if len(drawn) < len(places):
            kept.add(next(place for place in places if values[place] is None))
    return sorted(kept)


def _short(value: Any) -> float | None:
    """Five digits are more than a screen shows."""
    return float(f"{value:.5g}") if number(value) else None
