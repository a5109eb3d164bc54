"""`hydra/sweeper=optuna`: the space that a command line spans, and points that depend on results and a seed alone."""

import math
import sys

import pytest
from optuna.trial import TrialState, create_trial

from soup.cli.main import main

SPACE = (
    "-m",
    "hydra/sweeper=optuna",
    "optim.lr=tag(log,interval(1e-5,1e-2))",
    "lora.r=tag(int,interval(2,64))",
)


@pytest.fixture
def proposer(shell, monkeypatch):
    """What the sweeper hands to soup, for a command line."""
    import sys

    def made(*argv):
        kept = {}

        def record(points, args):
            kept.update(points=points, study=args.study)
            return 0

        monkeypatch.setattr(sys.modules["recording"], "record", record)
        done = shell.run(*argv)
        assert done.status == 0, done.err
        return kept["study"], kept["points"]

    return made


def values(points):
    return [(one.tree["optim"]["lr"], one.tree["lora"]["r"]) for one in points]


def test_the_first_points_are_those_that_need_no_results(proposer):
    study, points = proposer(*SPACE, "training.max_steps=3")
    assert len(points) == 10 and study.settings.n_trials == 20
    assert len(set(values(points))) == 10
    assert all(
        1e-5 <= rate <= 1e-2 and 2 <= rank <= 64 and type(rank) is int for rate, rank in values(points)
    )
    assert {one.tree["training"]["max_steps"] for one in points} == {3}
    below = sum(rate < math.sqrt(1e-7) for rate, _ in values(points))
    assert 2 <= below <= 8, "as many below the middle of the logarithm"
    again = proposer(*SPACE, "training.max_steps=3")[1]
    other = proposer(*SPACE, "hydra.sweeper.sampler.seed=1")[1]
    assert values(again) == values(points) != values(other)
    few = proposer(*SPACE, "hydra.sweeper.n_trials=3")[1]
    assert values(few) == values(points)[:3]
    many = proposer(*SPACE, "hydra/sweeper/sampler=random", "hydra.sweeper.n_trials=30")[1]
    assert len(many) == 30


def test_values_of_every_kind(proposer):
    study, points = proposer(
        "-m",
        "hydra/sweeper=optuna",
        "hydra.sweeper.params={lora.r: 'choice(4,8)'}",
        "task=dpo,ipo",
        "lora.alpha=range(4,20,4)",
        "lora.dropout=interval(0,0.5)",
    )
    assert {one.tree["lora"]["r"] for one in points} == {4, 8}
    assert {one.choices["task"] for one in points} == {"dpo", "ipo"}
    assert {one.tree["lora"]["alpha"] for one in points} <= {4, 8, 12, 16}
    assert all(0 <= one.tree["lora"]["dropout"] <= 0.5 for one in points)
    assert study.corner().choices["task"] == "dpo"


def test_a_proposal_follows_from_results_and_its_number(proposer):
    study, _ = proposer(*SPACE)
    trials = []
    for number in range(30):
        trial = study.propose(trials, number, "minimize")
        assert study.propose(trials, number, "minimize").params == trial.params
        score = abs(math.log10(trial.params["optim.lr"]) + 3) + trial.params["lora.r"] / 64
        trials.append(
            create_trial(
                state=TrialState.COMPLETE, value=score, params=trial.params, distributions=trial.distributions
            )
        )
    early, late = (sum(one.value for one in part) / 10 for part in (trials[:10], trials[20:]))
    assert late < early / 2, "it learns"
    assert study.propose(trials, 30, "minimize").params != study.propose(trials, 30, "maximize").params


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["lora.r=8"], "has nothing to choose between"),
        (["lora.r=8,16", "hydra.sweeper.n_trials=0"], "whole number from 1"),
        (["lora.r=8,16", "hydra.sweeper.direction=up"], "is minimize or maximize"),
        (["lora.r=8,16", "hydra.sweeper.storage=x"], "storage"),
        (["lora.r=8,16", "hydra/sweeper/sampler=cmaes"], "no such choice"),
        (["lora.r=8,16", "hydra.sweeper.sampler.seed=x"], "whole number from 0"),
        (["lora.r=8,16", "sweep.random=3"], "chooses its points itself"),
        (["optim.lr=tag(log,interval(0,1))"], "begins above 0"),
        (["lora.r=tag(int,interval(0.5,3))"], "no whole numbers"),
        (["lora.r=tag(lin,interval(1,3))"], "tags are log and int"),
        (["lora.r=8,16", "lora.alpha=${lora.rr}"], "lora.rr"),
    ],
)
def test_a_search_that_cannot_be_is_refused(shell, argv, said):
    result = shell.run("--multirun", "hydra/sweeper=optuna", *argv)
    assert result.status == 2
    assert said in result.err
    assert shell.calls == []


def test_without_optuna_a_search_is_refused(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)  # as it is where it is not installed
    assert main(["--multirun", "hydra/sweeper=optuna", "lora.r=8,16"]) == 2
    shown = capsys.readouterr().err
    assert "needs optuna, which is not installed" in shown and "pip install 'soup-launcher[optuna]'" in shown
