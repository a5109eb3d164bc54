"""One run as a report sees it, whatever state its folder is in: nothing is needed but what is there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import yaml

from soup import sweep as sweeps
from soup.cli.status import BAD, error
from soup.errors import RecordError
from soup.record import Run, read_json, tail
from soup.sweep import SweepPoint

TAIL_LINES = 20
TAIL_WIDTH = 300  # characters; a progress bar is one line of thousands

# OmegaConf takes 30 ms for a config.yaml, and a report reads hundreds. What `place` wrote is resolved and plain.
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, kw_only=True)
class Point:
    """`number`: from 1, as `soup status` counts. `words`: the overrides that tell it from the others of its sweep.
    `objective`: a metric, to be small; with a `-` before it, to be large. `value`: its last, a number or nothing.
    `settings`: the configuration, flat."""

    number: int
    run: Run
    words: str
    state: str
    objective: str
    value: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    effective: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    lines: tuple[Mapping[str, Any], ...] = ()
    error: str = ""
    last_lines: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return self.run.id

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self.words or str(
            self.settings.get("run.name") or f"{self.settings.get('task.name', 'run')} {self.id}"
        )

    @property
    def metric(self) -> str:
        return sweeps.metric(self.objective)

    @property
    def rank(self) -> float:
        """Where it stands among others of its objective: the least is the best, and without a value it is last."""
        if self.value is None:
            return math.inf
        return sweeps.sign(self.objective) * self.value

    @property
    def bad(self) -> bool:
        return self.state in (*BAD, UNREADABLE, GONE)

    @property
    def step(self) -> int | None:
        return next((one["step"] for one in (self.result, *reversed(self.lines)) if "step" in one), None)

    @property
    def steps(self) -> int | None:
        return self.result.get("steps") or self.plan.get("steps")

    @property
    def planned_bytes(self) -> int | None:
        return self.plan.get("peak_memory_bytes")

    @property
    def measured_bytes(self) -> int | None:
        key = "peak_memory_bytes"
        return self.result.get(key) or max((one[key] for one in self.lines if one.get(key)), default=None)

    @property
    def tokens_per_s(self) -> float | None:
        """The middle one of those that were logged: the first steps are slow."""
        found = [one["tokens_per_s"] for one in self.lines if number(one.get("tokens_per_s"))]
        return median(found) if found else None


UNREADABLE, GONE = "unreadable", "gone"


def read(place: int, run: Run, point: SweepPoint | None, objective: str | None = None) -> Point:
    """A run's folder. `objective`: its sweep's; otherwise its own. A file that cannot be read is the run's error."""
    words = point.words if point else ""
    if not run.exists():
        why = f"{run.folder} is not there" if not run.folder.is_dir() else f"{run.config} is not there"
        return Point(
            number=place, run=run, words=words, state=GONE, objective=objective or "eval_loss", error=why
        )
    try:
        state, result = run.look()
        settings = flat(_tree(run))
        objective = objective or settings.get("run.objective", "eval_loss")
        lines = tuple(line for line in run.lines() if isinstance(line, dict))
        found = {
            "result": result or {},
            "plan": read_json(run.plan) or (dict(point.planned) if point else {}),
            "effective": read_json(run.effective) or {},
            "environment": read_json(run.environment) or {},
        }
    except (RecordError, UnicodeDecodeError) as problem:
        return Point(
            number=place,
            run=run,
            words=words,
            state=UNREADABLE,
            objective=objective or "eval_loss",
            error=str(problem),
        )
    told = result or {}
    last = [told, *reversed(lines)]
    metric = sweeps.metric(objective)
    value = next((one[metric] for one in last if number(one.get(metric))), None)
    bad = state in BAD
    return Point(
        number=place,
        run=run,
        words=words,
        state=state,
        objective=objective,
        value=value,
        settings=settings,
        lines=lines,
        error=error(run, state, dict(told)) if bad else "",
        last_lines=_last_lines(run) if bad else (),
        **found,
    )


def number(value: Any) -> bool:
    """Whether it can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by their full keys; an empty section is a leaf."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _tree(run: Run) -> Mapping[str, Any]:
    try:
        tree = yaml.load(run.config.read_text(encoding="utf-8"), Loader)
    except (OSError, ValueError, yaml.YAMLError) as problem:
        raise RecordError(f"{run.config}: {problem}") from problem
    if not isinstance(tree, Mapping):
        raise RecordError(f"{run.config}: holds no configuration")
    return tree


def _last_lines(run: Run) -> tuple[str, ...]:
    """The end of what the libraries printed, or of what soup said where they printed nothing."""
    for path in (run.folder / "log.txt", run.console):
        text = tail(path).decode(errors="replace")
        # A progress bar is drawn over and over, each time after a carriage return: what was last there counts.
        lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
        if kept := [line for line in lines if line]:
            return tuple(
                line if len(line) <= TAIL_WIDTH else line[:TAIL_WIDTH] + " ..." for line in kept[-TAIL_LINES:]
            )
    return ()
