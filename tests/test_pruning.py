"""Pruners that read files decide as Optuna's do with a study of their own; a verdict is given once."""

import json
import random

import optuna
import pytest

from soup import pruning, sweep
from soup.errors import Refused
from soup.pruning import Pruner
from soup.sweep import SweepPoint

MEDIAN = {"name": "median", "n_startup_trials": 3, "n_warmup_steps": 20}
HALVING = {"name": "halving", "min_resource": 10, "reduction_factor": 2}
STEPS = range(10, 90, 10)


@pytest.fixture
def recorded(tmp_path):
    def make(pruner, count=12, objective="score"):
        points = [SweepPoint(run=f"run{number}", overrides=(f"x={number}",)) for number in range(count)]
        settings = {"name": "local", "wait": True, "slots": 1}
        made = sweep.record(
            tmp_path, command=[], settings=settings, objective=objective, points=points, pruner=pruner
        )
        for point in points:
            made.run(point).folder.mkdir(exist_ok=True)
        return made, [made.run(point) for point in points]

    return make


def curves(count, seed):
    draw = random.Random(seed)
    return [[draw.gauss(3 - step / 50, 0.5) for step in STEPS] for _ in range(count)]


def trained(pruner, run, values):
    """The steps that a run takes; it stops where it is told to."""
    run.metrics.touch()
    for step, value in zip(STEPS, values, strict=True):
        with run.metrics.open("a") as file:
            file.write(
                json.dumps({"step": step, "loss": 1.0})
                + "\n"
                + json.dumps({"step": step, "score": value})
                + "\n"
            )
        if pruner.judge(step, value):
            run.finish("pruned", score=value)
            return step
    run.finish("finished", score=values[-1])
    return None


@pytest.mark.parametrize("settings", [MEDIAN, HALVING], ids=lambda one: one["name"])
@pytest.mark.parametrize("objective", ["score", "-score"])
def test_the_same_points_are_pruned_as_by_a_study(recorded, settings, objective):
    made, runs = recorded(settings, objective=objective)
    knobs = {key: value for key, value in settings.items() if key != "name"}
    kind = {"median": optuna.pruners.MedianPruner, "halving": optuna.pruners.SuccessiveHalvingPruner}
    direction = "maximize" if objective.startswith("-") else "minimize"
    study = optuna.create_study(direction=direction, pruner=kind[settings["name"]](**knobs))
    ends = []
    for run, values in zip(runs, curves(len(runs), 0), strict=True):
        trial, ended = study.ask(), None
        for step, value in zip(STEPS, values, strict=True):
            trial.report(value, step)
            if trial.should_prune():
                ended = step
                break
        state = optuna.trial.TrialState.PRUNED if ended else optuna.trial.TrialState.COMPLETE
        study.tell(trial, None if ended else values[-1], state=state)
        ends.append((ended, trained(Pruner(made, run), run, values)))
    assert all(theirs == ours for theirs, ours in ends), ends
    assert 3 <= sum(theirs is not None for theirs, _ in ends) < len(ends)


def test_a_verdict_is_given_once_and_is_remembered_by_its_pruner_only(recorded):
    made, runs = recorded(MEDIAN | {"n_startup_trials": 1, "n_warmup_steps": 0}, count=3)
    good, bad, late = runs
    trained(Pruner(made, good), good, [1.0] * len(STEPS))
    pruner = Pruner(made, bad)
    assert trained(pruner, bad, [2.0] * len(STEPS)) == 10
    why = "score 2 at step 10 is worse than the median of the points that finished"
    assert pruner.over(10) == why and pruner.over(20) is None and Pruner(made, late).over(0) is None

    trained(Pruner(made, late), late, [0.5] * len(STEPS))
    good.result_file.unlink()  # what it would be compared with now does not matter
    assert pruner.judge(10, 2.0) == why
    assert [one["compared"] for one in pruner.verdicts()] == [1]
    made, _ = recorded(MEDIAN | {"n_startup_trials": 9}, count=3)
    assert pruner.over(10) is None and pruner.judge(10, 2.0) is None


def test_a_run_by_itself_is_not_judged(recorded, monkeypatch):
    made, (run, *_) = recorded(MEDIAN)
    assert pruning.of(run) is None
    monkeypatch.setenv("SOUP_SWEEP", made.id)
    assert pruning.of(run) == Pruner(made, run)
    recorded(None)
    assert pruning.of(run) is None and made.done == ("finished",)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pruner": "mean"}, "one of: none, median, halving"),
        ({"n_warmup_steps": "3"}, "is a setting of sweep.pruner=median"),
        ({"pruner": "halving", "n_warmup_steps": "3"}, "is a setting of sweep.pruner=median"),
        ({"pruner": "halving"}, "add sweep.min_resource=50"),
        ({"pruner": "halving", "min_resource": "0"}, "whole number from 1"),
        ({"pruner": "median", "n_startup_trials": "few"}, "whole number from 0"),
    ],
)
def test_a_pruner_that_cannot_be_is_refused(given, said):
    with pytest.raises(Refused, match=said):
        pruning.chosen(given)


def test_knobs_have_the_defaults_of_optuna():
    assert pruning.chosen({}) is None and pruning.chosen({"pruner": "none"}) is None
    median, halving = (
        pruning.chosen({"pruner": "median"}),
        pruning.chosen({"pruner": "halving", "min_resource": "5"}),
    )
    assert median == {"name": "median", "n_startup_trials": 5, "n_warmup_steps": 0}
    assert halving == {"name": "halving", "min_resource": 5, "reduction_factor": 4}
