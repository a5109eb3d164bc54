"""All that a report says, as plain data: what the page and the picture are both drawn from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from soup import sweep as sweeps
from soup.record import now
from soup.report import keys as settings_of
from soup.report.chosen import Chosen
from soup.report.curves import metrics
from soup.report.importance import Importance, importance
from soup.report.keys import Setting
from soup.report.point import Point, read
from soup.report.versions import Version, commands, versions


@dataclass(frozen=True, kw_only=True)
class Content:
    """`keys`: in which the points differ, as columns. `shared`: settings that all proved runs have in common.
    `invalid`: points that their sweep left out, with the reason."""

    title: str
    subtitle: str
    made: str
    points: tuple[Point, ...]
    objective: str
    keys: tuple[str, ...]
    metrics: tuple[str, ...]
    importance: Importance
    counts: Mapping[str, int]
    shared: Mapping[str, Setting]
    versions: tuple[Version, ...]
    commands: tuple[tuple[str, str], ...]
    invalid: tuple[tuple[str, str], ...]

    @property
    def metric(self) -> str:
        return sweeps.metric(self.objective)

    @cached_property
    def ranked(self) -> list[Point]:
        """Points that can be compared, the best first: those that finished with a value of the report's objective.

        Where none has, those that have a value.
        """
        scored = [one for one in self.points if one.value is not None and one.objective == self.objective]
        finished = [one for one in scored if one.state == "finished"]
        return sorted(finished or scored, key=lambda one: one.rank)

    @property
    def best(self) -> Point | None:
        return next(iter(self.ranked), None)

    @property
    def failures(self) -> list[Point]:
        return [one for one in self.points if one.bad]

    def own(self, point: Point) -> list[Setting]:
        """Settings of a run that not all runs share."""
        return [one for one in settings_of.settings(point) if one.key not in self.shared]


def gather(chosen: Chosen) -> Content:
    """Reads every run once."""
    objective = {
        point.run: sweep.record()["objective"] for sweep in chosen.sweeps for point in sweep.points()
    }
    points = tuple(
        read(place, run, point, objective.get(run.id)) for place, (run, point) in enumerate(chosen.points, 1)
    )
    goal = _commonest([one.objective for one in points])
    alike = [one for one in points if one.objective == goal and one.state == "finished"]
    keys = settings_of.columns(points)
    proved = [one for one in points if one.effective]
    return Content(
        title=chosen.title,
        subtitle=_subtitle(chosen, points),
        made=now(),
        points=points,
        objective=goal,
        keys=tuple(keys),
        metrics=tuple(metrics(points)),
        importance=importance(alike, keys),
        counts=dict(Counter(one.state for one in points)),
        shared=settings_of.shared([settings_of.settings(one) for one in proved]),
        versions=tuple(versions(points)),
        commands=tuple(commands(chosen)),
        invalid=tuple(
            (" ".join(one["overrides"]), one["why"])
            for sweep in chosen.sweeps
            for one in sweep.record()["invalid"]
        ),
    )


def _subtitle(chosen: Chosen, points: Sequence[Point]) -> str:
    told = []
    tasks = dict.fromkeys(str(one.settings["task.name"]) for one in points if "task.name" in one.settings)
    bases = dict.fromkeys(_base(one.settings["model.base"]) for one in points if "model.base" in one.settings)
    if tasks:
        told.append(f"{_few(tasks)} on {_few(bases)}")
    for sweep in chosen.sweeps[:3]:
        record = sweep.record()
        told.append(f"launch={record['launch']}, started {record['created']}")
    return "; ".join(told)


def _base(base: object) -> str:
    """A hub's name whole, of a folder its own name."""
    return Path(str(base)).name if str(base).startswith(("/", ".", "~")) else str(base)


def _few(names: Sequence[str] | Mapping[str, None], most: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _commonest(words: Sequence[str]) -> str:
    return Counter(words).most_common(1)[0][0]
