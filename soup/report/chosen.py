"""Which runs a report is about: those of the sweeps and the runs that its words name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from soup import record
from soup import sweep as sweeps
from soup.errors import Problem, Refused
from soup.record import Run
from soup.sweep import Sweep, SweepPoint


@dataclass(frozen=True)
class Chosen:
    """`points`: each run once, with its place in its sweep where it has one."""

    points: tuple[tuple[Run, SweepPoint | None], ...]
    sweeps: tuple[Sweep, ...]

    @property
    def name(self) -> str:
        """What the files are called: the one sweep's or run's id, or how many runs there are."""
        if len(self.sweeps) == 1 and self._alone:
            return self.sweeps[0].id
        return self.points[0][0].id if len(self.points) == 1 else f"{len(self.points)}-runs"

    @property
    def title(self) -> str:
        if len(self.sweeps) == 1 and self._alone:
            return f"Sweep {self.sweeps[0].id}"
        return f"Run {self.points[0][0].id}" if len(self.points) == 1 else f"{len(self.points)} runs"

    @property
    def _alone(self) -> bool:
        """Whether the sweep is all there is."""
        return all(point is not None for _, point in self.points)


def choose(root: Path, words: Sequence[str]) -> Chosen:
    """Sweeps and runs by id, by an unambiguous beginning of it, or `latest` (a sweep, where there is one).

    Without a word the latest sweep; where there is none, all runs.

    Raises:
        Refused: a word names nothing, or several things; nothing has run below `root`.
    """
    runs, made = record.find(root, []), sweeps.every(root)
    if not runs and not made:
        raise Refused(
            Problem(key="run.root", value=str(root), why="holds no run", fix="run.root=FOLDER of your runs")
        )
    if not words:
        words = ["latest"] if made else [run.id for run in runs]
    named, problems = [], []
    for word in words:
        match = _match(word, made, runs)
        if len(match) == 1:
            named.append(match[0])
            continue
        why = f"{len(match) or 'no'} runs or sweeps in {root} have an id that begins so"
        fix = "`soup runs` lists runs, `soup status` the latest sweep"
        if match:
            fix = f"one of: {', '.join(one.id for one in match[:5])}"
        problems.append(Problem(key="report", value=word, why=why, fix=fix))
    if problems:
        raise Refused(problems)
    points: dict[str, tuple[Run, SweepPoint | None]] = {}
    for one in named:
        if isinstance(one, Run):
            points.setdefault(one.id, (one, None))
            continue
        for point in one.points():
            if points.get(point.run, (None, None))[1] is None:
                points[point.run] = (one.run(point), point)
    return Chosen(
        tuple(points.values()), tuple(dict.fromkeys(one for one in named if isinstance(one, Sweep)))
    )


def _match(word: str, made: Sequence[Sweep], runs: Sequence[Run]) -> list[Sweep | Run]:
    if word == "latest":
        return list(made[-1:] or runs[-1:])
    every = [*made, *runs]
    return [one for one in every if one.id == word] or [one for one in every if one.id.startswith(word)]
