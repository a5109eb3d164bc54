"""Stops a bad point of a sweep early, by Optuna's pruners and from files alone.

At each line of metrics.jsonl that has the sweep's objective, a run is compared with the others of its sweep, as their
folders say they went: no server, and no second record that could disagree. A verdict is kept in the run's
`pruning.json` with what it was compared with, and is not asked again when the run goes on after a crash, so one at a
time (`launch.slots=1`) the same sweep prunes the same points. Several at a time, a verdict depends on which others
had come how far.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soup.errors import Problem, Refused
from soup.record import Run, read_json, write_json
from soup.sweep import FOLDER, Sweep, metric, sign

# Optuna's names and, where it has any, its defaults (arXiv:1810.05934 for halving). Steps are optimizer steps.
KNOBS: Mapping[str, Mapping[str, int | None]] = {
    "none": {},
    "median": {"n_startup_trials": 5, "n_warmup_steps": 0},
    "halving": {"min_resource": None, "reduction_factor": 4},
}
LEAST = {"n_startup_trials": 0, "n_warmup_steps": 0, "min_resource": 1, "reduction_factor": 2}
WHY = {
    "median": "worse than the median of the points that finished",
    "halving": "not among the best 1/{reduction_factor} of the points that came as far",
}


def chosen(given: Mapping[str, str]) -> dict[str, Any] | None:
    """The pruner that words of the command line ask for, with its knobs; `given`: values by key without `sweep.`.

    Raises:
        Refused: no such pruner, a knob of another one, a value that it does not take.
    """
    name = given.get("pruner", "none")
    if name not in KNOBS:
        why = "no such pruner"
        raise Refused(Problem(key="sweep.pruner", value=name, why=why, fix=f"one of: {', '.join(KNOBS)}"))
    problems, knobs = [], dict(KNOBS[name])
    for key in (key for key in given if key != "pruner"):
        owner = next(one for one in KNOBS if key in KNOBS[one])
        if owner != name:
            why = f"is a setting of sweep.pruner={owner}"
            fix = f"add sweep.pruner={owner}, or drop it"
        elif not given[key].isdecimal() or int(given[key]) < LEAST[key]:
            why, fix = f"is a whole number from {LEAST[key]}", f"sweep.{key}={KNOBS[name][key] or 50}"
        else:
            knobs[key] = int(given[key])
            continue
        problems.append(Problem(key=f"sweep.{key}", value=given[key], why=why, fix=fix))
    if not problems and None in knobs.values():
        why = "needs the optimizer step of its first comparison, one at which points are evaluated"
        problems.append(Problem(key="sweep.pruner", value=name, why=why, fix="add sweep.min_resource=50"))
    if problems:
        raise Refused(problems)
    if name == "none":
        return None
    needed("sweep.pruner", name)
    return {"name": name, **knobs}


def needed(key: str, value: str) -> None:
    """Refuses where Optuna is not installed."""
    from importlib.util import find_spec

    if find_spec("optuna") is None:
        fix = "pip install 'soup-launcher[optuna]'"
        raise Refused(Problem(key=key, value=value, why="needs optuna, which is not installed", fix=fix))


@dataclass(frozen=True)
class Pruner:
    """What judges one run of a sweep."""

    sweep: Sweep
    run: Run

    @property
    def file(self) -> Path:
        return self.run.folder / "pruning.json"

    def verdicts(self) -> list[dict[str, Any]]:
        """Of each judgement so far: step, value, pruned, why, compared (a number of runs), rungs, and the pruner."""
        return read_json(self.file) or []

    def over(self, step: int) -> str | None:
        """Why the run was to stop at this step, where it was; a crash may have come between."""
        last = next((one for one in self.verdicts() if one["step"] == step), None)
        return last["why"] if last and last["pruned"] and last["pruner"] == self.settings() else None

    def settings(self) -> dict[str, Any]:
        return self.sweep.record()["pruner"]

    def judge(self, step: int, value: float) -> str | None:
        """Why the run is to stop at this step, `None` where it goes on."""
        settings, before = self.settings(), self.verdicts()
        for one in before:
            if (one["step"], one["value"], one["pruner"]) == (step, value, settings):
                return one["why"]
        before = [one for one in before if one["step"] < step and one["pruner"] == settings]
        name = settings["name"]
        others = self._others(name)
        pruned, rungs = _ask(settings, sign(self.sweep.objective), others, self._values(self.run), before)
        why = None
        if pruned:
            why = (
                f"{metric(self.sweep.objective)} {value:.4g} at step {step} is {WHY[name].format(**settings)}"
            )
        line = {"step": step, "value": value, "pruned": pruned, "why": why, "compared": len(others)}
        write_json(self.file, [*before, line | {"rungs": rungs, "pruner": settings}])
        return why

    def _others(self, name: str) -> list[tuple[str, dict[int, float], dict[str, float]]]:
        """State, objective by step, and rungs of the runs that this one is compared with."""
        found = []
        for point in self.sweep.points():
            other = self.sweep.run(point)
            if other.id == self.run.id:
                continue
            if name == "median":  # Optuna's compares with those that finished
                state = other.state()
                if state == "finished":
                    found.append((state, self._values(other), {}))
            elif verdicts := Pruner(self.sweep, other).verdicts():
                found.append(("came", {}, verdicts[-1]["rungs"]))
        return found

    def _values(self, run: Run) -> dict[int, float]:
        name = metric(self.sweep.objective)
        return {line["step"]: line[name] for line in run.lines() if name in line}


def of(run: Run) -> Pruner | None:
    """What judges a run that a sweep with a pruner has started; by itself a run is not judged."""
    sweep = os.environ.get("SOUP_SWEEP")
    if sweep is None:
        return None
    found = Sweep(run.folder.parent / FOLDER / sweep)
    return Pruner(found, run) if found.file.is_file() and found.pruned else None


def _ask(
    settings: Mapping[str, Any],
    order: int,
    others: Sequence[tuple[str, dict[int, float], dict[str, float]]],
    values: Mapping[int, float],
    before: Sequence[Mapping[str, Any]],
) -> tuple[bool, dict[str, float]]:
    """Optuna's answer, from a study in memory; and the rungs that the run has reached."""
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    knobs = {key: value for key, value in settings.items() if key != "name"}
    kind = (
        optuna.pruners.MedianPruner
        if settings["name"] == "median"
        else optuna.pruners.SuccessiveHalvingPruner
    )
    study = optuna.create_study(direction="minimize" if order > 0 else "maximize")
    for state, reported, rungs in others:
        ended = TrialState.COMPLETE if state == "finished" else TrialState.RUNNING
        study.add_trial(
            create_trial(
                state=ended,
                value=0.0 if ended == TrialState.COMPLETE else None,  # which no pruner reads
                intermediate_values=reported,
                system_attrs=rungs,
            )
        )
    own = before[-1]["rungs"] if before else {}
    study.add_trial(
        create_trial(state=TrialState.RUNNING, intermediate_values=dict(values), system_attrs=own)
    )
    pruned = kind(**knobs).prune(study, study.trials[-1])
    return bool(pruned), dict(study.trials[-1].system_attrs)
