"""What `hydra/sweeper=optuna` searches, and how a point is proposed: a function of the results so far and a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import IntervalSweep, Override

from soup.cli.compose import Point
from soup.errors import Problem, Refused
from soup.pruning import needed

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

SAMPLERS = ("tpe", "random")
DIGITS = 6  # of numbers that are drawn, which people read


@dataclass(frozen=True)
class Settings:
    """Of hydra.sweeper: how many points, how many at a time, whether the command line names a direction, and the
    sampler with its arguments."""

    n_trials: int
    n_jobs: int | None
    direction: str | None
    sampler: Mapping[str, Any]

    @classmethod
    def checked(cls, given: Mapping[str, Any], sampler: Mapping[str, Any]) -> Settings:
        """Refuses values that mean nothing."""
        needed("hydra/sweeper", "optuna")
        problems = []

        def whole(key: str, value: Any, least: int) -> None:
            if type(value) is not int or value < least:
                why = f"is a whole number from {least}"
                problems.append(Problem(key=f"hydra.sweeper.{key}", value=value, why=why, fix="correct it"))

        whole("n_trials", given["n_trials"], 1)
        if given["n_jobs"] is not None:
            whole("n_jobs", given["n_jobs"], 1)
        if given["direction"] not in (None, "minimize", "maximize"):
            why, fix = "is minimize or maximize", "drop it: run.objective says which"
            problems.append(
                Problem(key="hydra.sweeper.direction", value=given["direction"], why=why, fix=fix)
            )
        if sampler.get("name") not in SAMPLERS:
            why, fix = "no such sampler", f"hydra/sweeper/sampler={' or '.join(SAMPLERS)}"
            problems.append(
                Problem(key="hydra.sweeper.sampler.name", value=sampler.get("name"), why=why, fix=fix)
            )
        for key, value in sampler.items():
            if key != "name":
                whole(f"sampler.{key}", value, int(key != "seed"))
        if problems:
            raise Refused(problems)
        return cls(**given, sampler=sampler)


@dataclass(frozen=True)
class Axis:
    """A key of the search space: Optuna's distribution of its values, and each as a word of the command line."""

    key: str
    distribution: BaseDistribution

    def word(self, value: Any) -> str:
        return f"{self.key}={value:.{DIGITS}g}" if isinstance(value, float) else f"{self.key}={value}"


def space(overrides: Sequence[Override]) -> tuple[Axis, ...]:
    """The keys that have several values.

    Raises:
        Refused: there is none, or an interval is none.
    """
    axes = tuple(
        Axis(one.get_key_element(), _distribution(one)) for one in overrides if one.is_sweep_override()
    )
    if not axes:
        why = "has nothing to choose between"
        fix = "give keys several values: optim.lr='tag(log, interval(1e-5, 1e-3))' lora.r=8,16"
        raise Refused(Problem(key="hydra/sweeper", value="optuna", why=why, fix=fix))
    return axes


def _distribution(override: Override) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value, key = override.value(), override.get_key_element()
    if override.is_interval_sweep():
        return _interval(key, value)
    [[*single]] = BasicSweeper.split_arguments([override], None)
    texts = [word.partition("=")[2] for (word,) in single]
    if not texts:
        raise Refused(Problem(key=key, why="has no values", fix=f"{key}=a,b,c"))
    if override.is_range_sweep() and not value.shuffle:
        whole = all(isinstance(one, int) for one in (value.start, value.stop, value.step))
        ends = sorted(map(int if whole else float, (texts[0], texts[-1])))
        kind = IntDistribution if whole else FloatDistribution
        return kind(*ends, step=abs(value.step))
    return CategoricalDistribution(list(dict.fromkeys(texts)))


def _interval(key: str, interval: IntervalSweep) -> BaseDistribution:
    from optuna.distributions import FloatDistribution, IntDistribution

    low, high, tags = interval.start, interval.end, interval.tags
    text = f"interval({low:g},{high:g})"
    if unknown := tags - {"log", "int"}:
        why = f"has the tag {', '.join(sorted(unknown))}"
        raise Refused(Problem(key=key, value=text, why=why, fix="tags are log and int"))
    if not low < high or ("log" in tags and low <= 0):
        why = "an interval goes up, and one in logarithms begins above 0"
        raise Refused(Problem(key=key, value=text, why=why, fix=f"{key}=interval(low,high)"))
    if "int" not in tags:
        return FloatDistribution(low, high, log="log" in tags)
    if int(low) != low or int(high) != high:
        raise Refused(
            Problem(key=key, value=text, why="its ends are no whole numbers", fix="drop the tag int")
        )
    return IntDistribution(int(low), int(high), log="log" in tags)


@dataclass(frozen=True)
class Proposer:
    """`fixed`: overrides that all points have. `compose`: from overrides to a point."""

    axes: tuple[Axis, ...]
    fixed: tuple[str, ...]
    settings: Settings
    compose: Callable[[Sequence[str]], Point]

    def first(self) -> list[Point]:
        """Points that depend on no results: those that the sampler draws at random.

        Raises:
            Refused: some cannot be composed; with all problems.
        """
        sampler = self.settings.sampler
        count = min(self.settings.n_trials, sampler.get("n_startup_trials", self.settings.n_trials)) or 1
        before: list[FrozenTrial] = []
        for _ in range(count):
            before.append(self.propose(before, len(before), "minimize"))
        points, problems = [], dict[Problem, None]()
        for trial in before:
            try:
                points.append(self.point(trial))
            except Refused as refused:
                problems |= dict.fromkeys(refused.problems)
        if problems:
            raise Refused(problems)
        return points

    def propose(self, trials: Sequence[FrozenTrial], number: int, direction: str) -> FrozenTrial:
        """The `number`th point, from 0, as a trial that runs; `trials`: those so far.

        Its seed is its number's, so that a study that was interrupted goes on as it would have.
        """
        import optuna
        from optuna.trial import TrialState, create_trial

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = dict(self.settings.sampler)
        seed = random.Random(f"{sampler.pop('seed')} {number}").getrandbits(32)
        kind = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        study = optuna.create_study(
            direction=direction, sampler=kind[sampler.pop("name")](seed=seed, **sampler)
        )
        study.add_trials(list(trials))
        study.ask({axis.key: axis.distribution for axis in self.axes})
        found = study.get_trials(deepcopy=False)[-1]
        return create_trial(
            state=TrialState.RUNNING,
            params={axis.key: _rounded(found.params[axis.key], axis.distribution) for axis in self.axes},
            distributions={axis.key: axis.distribution for axis in self.axes},
            system_attrs=found.system_attrs,
        )

    def words(self, trial: FrozenTrial) -> tuple[str, ...]:
        return tuple(axis.word(trial.params[axis.key]) for axis in self.axes)

    def point(self, trial: FrozenTrial) -> Point:
        return self.compose((*self.fixed, *self.words(trial)))

    def corner(self) -> Point:
        """A point that stands for the space whatever the sampler: the first or least value of each key.

        Raises:
            Refused: it cannot be composed.
        """
        words = []
        for axis in self.axes:
            choices = getattr(axis.distribution, "choices", None)
            words.append(axis.word(choices[0] if choices else axis.distribution.low))
        return self.compose((*self.fixed, *words))


def _rounded(value: Any, distribution: Any) -> Any:
    if not isinstance(value, float):
        return value
    return min(max(float(f"{value:.{DIGITS}g}"), distribution.low), distribution.high)
