"""Sweeps on disk: which runs belong to one, and where each stands. They hold references; runs lie at <root>/<id>/.

`<run.root>/sweeps/<id>/sweep.json` is written before the first run starts. `jobs.json` and `local.json` beside it are
the launchers'. What a run has come to is read from its own folder, never from here, so the two cannot disagree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from soup.errors import Problem, RecordError, Refused
from soup.record import DONE, Run, now, read_json, tail, write, write_json

__all__ = [
    "DONE",
    "Sweep",
    "SweepPoint",
    "every",
    "find",
    "last_metrics",
    "metric",
    "record",
    "sign",
    "update",
]

FOLDER = "sweeps"


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One run of a sweep.

    `overrides`: the words that tell it from the other points. `run`: the name of its folder. `planned`:
    peak_memory_bytes, disk_bytes, steps, tokens, parameters. `launch`: those of its launch settings that
    are not the sweep's.
    """

    run: str
    overrides: tuple[str, ...] = ()
    planned: Mapping[str, int] = field(default_factory=dict)
    launch: Mapping[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        return " ".join(self.overrides)


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder and what it holds."""

    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def root(self) -> Path:
        """`run.root`, below which the runs lie."""
        return self.folder.parents[1]

    @property
    def file(self) -> Path:
        return self.folder / "sweep.json"

    @property
    def jobs(self) -> Path:
        """launch=slurm: ids of jobs by run."""
        return self.folder / "jobs.json"

    @property
    def local(self) -> Path:
        """launch=local: the processes that run this sweep."""
        return self.folder / "local.json"

    @property
    def log(self) -> Path:
        """launch=local, wait=false: what the process that runs the sweep prints."""
        return self.folder / "log.txt"

    @property
    def objective(self) -> str:
        return self.record()["objective"]

    @property
    def pruned(self) -> bool:
        """Whether it stops bad points early."""
        return self.record().get("pruner") is not None

    @property
    def done(self) -> tuple[str, ...]:
        """States of runs that are not trained again; without a pruner, one that was pruned elsewhere goes on."""
        return DONE if self.pruned else ("finished",)

    def record(self) -> dict[str, Any]:
        """sweep.json: id, created, command, launch (a name), settings (its section), objective, pruner, points,
        invalid."""
        found = read_json(self.file)
        if found is None:
            raise RecordError(f"{self.file}: there is no such file")
        return found

    def points(self) -> list[SweepPoint]:
        return [
            SweepPoint(
                run=one["run"],
                overrides=tuple(one["overrides"]),
                planned=one["planned"],
                launch=one.get("launch", {}),
            )
            for one in self.record()["points"]
        ]

    def run(self, point: SweepPoint) -> Run:
        return Run(self.root / point.run)

    def settings(self, point: SweepPoint) -> dict[str, Any]:
        """The launch section of a point, as this sweep was last given; the run's own config.yaml keeps its first."""
        return self.record()["settings"] | dict(point.launch)

    def states(self) -> dict[str, str]:
        """The state of each run, by its id."""
        return {point.run: self.run(point).state() for point in self.points()}


def metric(objective: str) -> str:
    """The logged metric that an objective names: `-reward` is the largest reward first."""
    return objective.removeprefix("-")


def sign(objective: str) -> int:
    """1 where small values are good, -1 where large ones are."""
    return -1 if objective.startswith("-") else 1


def sweep_id(runs: Sequence[str], launch: str) -> str:
    """12 hexadecimal digits: the same runs under the same launcher are the same sweep."""
    return hashlib.sha256(json.dumps([sorted(runs), launch]).encode()).hexdigest()[:12]


def record(
    root: Path,
    *,
    command: Sequence[str],
    settings: Mapping[str, Any],
    objective: str,
    points: Sequence[SweepPoint],
    invalid: Sequence[Mapping[str, Any]] = (),
    pruner: Mapping[str, Any] | None = None,
    identity: str | None = None,
) -> Sweep:
    """Writes sweep.json, and returns the sweep; one that is there keeps its time of creation.

    `settings`: the launch section, with its `name`. `invalid`: {overrides, why} of points that were left out.
    `pruner`: its name and knobs. `identity`: the sweep's id, where its runs are not known beforehand.

    Raises:
        Refused: `root` cannot be written.
    """
    launch = settings["name"]
    sweep = Sweep(root / FOLDER / (identity or sweep_id([point.run for point in points], launch)))
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
        before = read_json(sweep.file) or {}
        listed = [
            {key: value for key, value in asdict(point).items() if key != "launch" or value}
            for point in points
        ]
        content = {
            "id": sweep.id,
            "created": before.get("created", now()),
            "command": list(command),
            "launch": launch,
            "settings": dict(settings),
            "objective": objective,
            "pruner": None if pruner is None else dict(pruner),
            "invalid": list(invalid),
        }
        # A line for each point: half the size, and readable.
        lines = ",\n".join(f"    {json.dumps(one, ensure_ascii=False)}" for one in listed)
        head = json.dumps(content, indent=2, ensure_ascii=False).removesuffix("\n}")
        write(sweep.file, f'{head},\n  "points": [\n{lines}\n  ]\n}}\n')
    except (OSError, RecordError) as error:
        raise Refused(
            Problem(key="run.root", value=str(root), why=f"cannot be written: {error}", fix="run.root=FOLDER")
        ) from error
    return sweep


def every(root: Path) -> list[Sweep]:
    """All sweeps below `root`, the most recently given last."""
    found = [Sweep(path.parent) for path in (root / FOLDER).glob("*/sweep.json")]
    return sorted(found, key=lambda sweep: sweep.file.stat().st_mtime)


def find(root: Path, word: str = "latest") -> Sweep:
    """The sweep whose id begins with `word`, or the one that was given most recently.

    Raises:
        Refused: there is none, or there are several.
    """
    found = every(root)
    match = found[-1:] if word == "latest" else [one for one in found if one.id.startswith(word)]
    if len(match) == 1:
        return match[0]
    why = (
        f"{len(match) or 'no'} sweeps in {root} have an id that begins so"
        if found
        else f"there is no sweep in {root}"
    )
    fix = (
        f"one of: {', '.join(one.id for one in found[-5:])}"
        if found
        else "run.root=FOLDER, if it is elsewhere"
    )
    raise Refused(Problem(key="sweep", value=word, why=why, fix=fix))


def update(sweep: Sweep, name: str, change: Any) -> Any:
    """Replaces a launcher's JSON file by `change(what it held)`, one process at a time; returns the new content."""
    from filelock import FileLock

    with FileLock(sweep.folder / f".{name}.lock"):
        content = change(read_json(sweep.folder / name))
        write_json(sweep.folder / name, content)
    return content


def last_metrics(run: Run, metric: str) -> dict[str, Any]:
    """The last line of a run's metrics.jsonl, and the last value of one metric, without reading it all."""
    lines = tail(run.metrics).splitlines()
    marked = f'"{metric}"'.encode()
    last = next((one for line in reversed(lines) if (one := _parsed(line))), {})
    value = next((one for line in reversed(lines) if marked in line and (one := _parsed(line))), {})
    return {metric: value.get(metric)} | last


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line that is whole: the first of a tail may be the rest of one, the last the beginning of one."""
    try:
        one = json.loads(line)
    except ValueError:
        return None
    return one if isinstance(one, dict) else None
