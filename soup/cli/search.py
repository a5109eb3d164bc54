"""Which points a sweep has: Hydra's product of all values, values paired by `sweep.zip`, a sample by `sweep.random`.

sweep.zip=[lora.r,lora.alpha]   these keys take their first values together, then their second, ...
sweep.random=20                 that many points drawn from the product; interval(a,b) is drawn uniformly, and
                                tag(log,interval(a,b)) uniformly in its logarithm
sweep.seed=0                    of the draw: 30 points begin with the 20 of the same seed
sweep.pruner=median             stops bad points early, by Optuna's pruners, whatever chose the points:
    sweep.n_startup_trials=5    median: only once so many have finished
    sweep.n_warmup_steps=0      and not before this optimizer step
sweep.pruner=halving            successive halving
    sweep.min_resource=50       from this step on, needed
    sweep.reduction_factor=4    the best quarter of the points at this step goes on, then at 4 times that step, ...
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import IntervalSweep, Override

from soup.errors import Problem, Refused
from soup.pruning import LEAST, chosen

PRUNING = ("pruner", *LEAST)
KEYS = ("sweep.zip", "sweep.random", "sweep.seed", *(f"sweep.{name}" for name in PRUNING))
Words = tuple[str, ...]
Axis = Sequence[Words] | Callable[[random.Random], Words]  # values, or how one is drawn


@dataclass(frozen=True)
class Search:
    """`zipped`: keys whose values are paired. `count`: points to draw, all of the product if `None`."""

    zipped: tuple[str, ...] = ()
    count: int | None = None
    seed: int = 0

    def split(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """In place of BasicSweeper.split_arguments: batches of points, each a list of overrides."""
        axes = self._axes(overrides)
        points = list(itertools.product(*axes.values())) if self.count is None else self._draw(axes)
        batch = [[word for words in point for word in words] for point in points]
        return list(BasicSweeper.split_overrides_to_chunks(batch, max_batch_size)) if batch else [[]]

    def _axes(self, overrides: list[Override]) -> dict[str, Any]:
        axes: dict[str, Any] = {}
        for override in overrides:
            key = override.get_key_element()
            if self.count is not None and override.is_interval_sweep():
                axes[key] = _interval(key, override.value())
                continue
            [[*single]] = BasicSweeper.split_arguments([override], None)
            axes[key] = [tuple(words) for words in single]
        if not self.zipped:
            return axes
        lengths = {key: len(axes[key]) for key in self.zipped if isinstance(axes.get(key), list)}
        if missing := [key for key in self.zipped if lengths.get(key, 1) < 2]:
            why = f"{', '.join(missing)} has no list of values to pair"
            raise Refused(Problem(key="sweep.zip", why=why, fix=f"give {missing[0]}=a,b,c, or leave it out"))
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{key} has {length}" for key, length in lengths.items())
            why = f"values are paired, and these have different numbers: {told}"
            raise Refused(Problem(key="sweep.zip", why=why, fix="give each as many values"))
        pairs = zip(*(axes.pop(key) for key in self.zipped), strict=True)
        axes["sweep.zip"] = [tuple(itertools.chain(*words)) for words in pairs]
        return axes

    def _draw(self, axes: dict[str, Any]) -> list[tuple[Words, ...]]:
        """Different points, in the order in which the seed draws them."""
        assert self.count is not None
        every = (
            math.inf if any(callable(axis) for axis in axes.values()) else math.prod(map(len, axes.values()))
        )
        generator = random.Random(self.seed)
        found: dict[tuple[Words, ...], None] = {}
        while len(found) < min(self.count, every):
            found.setdefault(
                tuple(axis(generator) if callable(axis) else generator.choice(axis) for axis in axes.values())
            )
        return list(found)


def taken(overrides: Sequence[str], *, multirun: bool) -> tuple[Search, dict[str, Any] | None, list[str]]:
    """The search that a command line asks for, the pruner, and its other overrides.

    Raises:
        Refused: a `sweep.` word that means nothing, or one without a sweep.
    """
    given, rest, problems = {}, [], []
    for word in overrides:
        key, _, value = word.partition("=")
        if not key.startswith("sweep."):
            rest.append(word)
        elif key not in KEYS:
            problems.append(
                Problem(key=word, why="no such setting of a sweep", fix=f"one of: {', '.join(KEYS)}")
            )
        elif not multirun:
            problems.append(Problem(key=word, why="is for a sweep", fix="add --multirun, or drop it"))
        else:
            given[key] = value
    zipped = [key.strip() for key in given.get("sweep.zip", "").strip("[]").split(",") if key.strip()]
    if "sweep.zip" in given and len(set(zipped)) < 2:
        why, fix = "pairs the values of two keys or more", "sweep.zip=[lora.r,lora.alpha]"
        problems.append(Problem(key="sweep.zip", value=given["sweep.zip"], why=why, fix=fix))
    if "sweep.seed" in given and "sweep.random" not in given:
        why, fix = "is the seed of sweep.random", "add sweep.random=20, or drop it"
        problems.append(Problem(key="sweep.seed", value=given["sweep.seed"], why=why, fix=fix))
    numbers = {}
    for key, least in (("sweep.random", 1), ("sweep.seed", 0)):
        value = given.get(key)
        if value is None:
            continue
        if not value.isdecimal() or int(value) < least:
            why = f"is a whole number from {least}"
            problems.append(Problem(key=key, value=value, why=why, fix=f"{key}={max(least, 20)}"))
            continue
        numbers[key] = int(value)
    if problems:
        raise Refused(problems)
    pruner = chosen({name: given[f"sweep.{name}"] for name in PRUNING if f"sweep.{name}" in given})
    return Search(tuple(zipped), numbers.get("sweep.random"), numbers.get("sweep.seed", 0)), pruner, rest


def _interval(key: str, interval: IntervalSweep) -> Callable[[random.Random], Words]:
    start, end = interval.start, interval.end
    log = "log" in interval.tags
    if not start < end or (log and start <= 0):
        why = "an interval goes up, and one in logarithms begins above 0"
        raise Refused(
            Problem(key=key, value=f"interval({start},{end})", why=why, fix=f"{key}=interval(low,high)")
        )

    def draw(generator: random.Random) -> Words:
        value = (
            math.exp(generator.uniform(math.log(start), math.log(end)))
            if log
            else generator.uniform(start, end)
        )
        return (f"{key}={value:.6g}",)

    return draw
