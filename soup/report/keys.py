"""In which settings the points of a report differ, and what each was as requested and in force."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from soup.record import NOT_IDENTITY
from soup.report.point import Point, number

COLUMNS = 10  # of the table; each run's own section has all
ABSENT = "-"
OUTSIDE = "outside training"  # as soup.effects says of what the launcher, tracker and recorder read


@dataclass(frozen=True)
class Setting:
    """One key of one run. `resolved`: what is in force is not what was asked for, as with `auto`."""

    key: str
    requested: str
    effective: str
    how: str
    ok: bool
    resolved: bool


def columns(points: Sequence[Point]) -> list[str]:
    """The keys that the table shows: those that a sweep was told to vary; for other runs those that differ.

    A group whose choice differs stands for its own keys: `optim`, and not all of `optim.galore_*`.
    """
    named = dict.fromkeys(_key(word) for point in points for word in point.words.split(" ") if "=" in word)
    if named and all(point.words for point in points):
        found = [key for key in named if len({shown(value(one, key)) for one in points}) > 1]
    else:
        found = []
        for key in differing(points):
            group, _, leaf = key.rpartition(".")
            above = key.partition(".")[0]
            if leaf == "name" and "." not in group:
                found.append(group)
            elif f"{above}.name" not in differing(points):
                found.append(key)
    return found[:COLUMNS]


def differing(points: Sequence[Point]) -> list[str]:
    """Keys of the configuration that not all runs share; where a run lies and what it is called is not among them."""
    read = [one for one in points if one.settings]
    found = []
    for key in dict.fromkeys(key for one in read for key in one.settings):
        if key.partition(".")[0] in NOT_IDENTITY:
            continue
        if len({json.dumps(one.settings.get(key, ABSENT), sort_keys=True, default=str) for one in read}) > 1:
            found.append(key)
    return found


def value(point: Point, key: str) -> Any:
    """What a key is in a run: a leaf, a group's choice, or the word of the command line where it is neither."""
    for path in (key, f"{key}.name"):
        if path in point.settings:
            return point.settings[path]
    for word in point.words.split(" "):
        if _key(word) == key and "=" in word:
            return word.partition("=")[2]
    return None


def shown(value: Any) -> str:
    """A setting's value as a person reads it: what YAML would say, short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value
    if number(value):
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def settings(point: Point) -> list[Setting]:
    """Every key of a run: from effective.json where it was proved, else from its configuration."""
    if not point.effective:
        return [
            Setting(key, shown(one), ABSENT, "not proved: the run did not come so far", True, False)
            for key, one in point.settings.items()
        ]
    found = []
    for key, one in point.effective.items():
        requested, effective = shown(one.get("requested")), shown(one.get("effective"))
        resolved = effective not in (requested, OUTSIDE)
        found.append(
            Setting(key, requested, effective, str(one.get("how", "")), one.get("ok") is True, resolved)
        )
    return found


def shared(every: Sequence[Sequence[Setting]]) -> dict[str, Setting]:
    """Of several runs' settings those that all have and that are the same in all, in request and in force."""
    if not every:
        return {}
    first = {one.key: one for one in every[0]}
    for other in every[1:]:
        there = {one.key: (one.requested, one.effective, one.ok) for one in other}
        first = {
            key: one for key, one in first.items() if there.get(key) == (one.requested, one.effective, one.ok)
        }
    return first


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")
