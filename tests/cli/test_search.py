"""Paired values and random search: which points a sweep has."""

import math

import pytest


def values(points, *keys):
    return [tuple(one.tree[key.split(".")[0]][key.split(".")[1]] for key in keys) for one in points]


def test_paired_values_beside_the_product(shell):
    words = ("sweep.zip=[lora.r,lora.alpha]", "lora.r=8,16", "lora.alpha=16,32", "optim.lr=1e-3,1e-4")
    points = shell.points("-m", *words)
    assert sorted(values(points, "lora.r", "lora.alpha", "optim.lr")) == [
        (8, 16, 1e-4),
        (8, 16, 1e-3),
        (16, 32, 1e-4),
        (16, 32, 1e-3),
    ]


def test_groups_pair_with_values(shell):
    points = shell.points("-m", "sweep.zip=[task,optim.lr]", "task=sft,dpo", "optim.lr=1e-3,1e-4")
    assert [(one.choices["task"], one.tree["optim"]["lr"]) for one in points] == [
        ("sft", 1e-3),
        ("dpo", 1e-4),
    ]


def test_a_larger_sample_begins_with_the_smaller(shell):
    grid = ("lora.r=range(1,40)", "optim.lr=tag(log,interval(1e-5,1e-2))", "lora.dropout=interval(0,0.5)")
    twenty = values(shell.points("-m", "sweep.random=20", *grid), "lora.r", "optim.lr", "lora.dropout")
    thirty = values(shell.points("-m", "sweep.random=30", *grid), "lora.r", "optim.lr", "lora.dropout")
    other = values(
        shell.points("-m", "sweep.random=20", "sweep.seed=1", *grid), "lora.r", "optim.lr", "lora.dropout"
    )
    assert thirty[:20] == twenty != other
    assert len(set(thirty)) == 30
    rates = [rate for _, rate, _ in thirty]
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert 8 <= sum(rate < math.sqrt(1e-7) for rate in rates) <= 22, (
        "as many below the middle of the logarithm"
    )
    assert all(0 <= dropout <= 0.5 for _, _, dropout in thirty)


def test_a_sample_of_more_than_there_is_is_all(shell):
    assert len(shell.points("-m", "sweep.random=50", "lora.r=1,2", "optim.lr=1e-3,1e-4")) == 4


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-m", "sweep.zip=[lora.r,lora.alpha]", "lora.r=8,16", "lora.alpha=1,2,3"], "different numbers"),
        (["-m", "sweep.zip=[lora.r,lora.alpha]", "lora.r=8,16", "lora.alpha=1"], "lora.alpha has no list"),
        (["-m", "sweep.zip=[lora.r,optim.lr]", "lora.r=8,16"], "optim.lr has no list"),
        (["-m", "sweep.zip=[lora.r]", "lora.r=8,16"], "two keys or more"),
        (["-m", "sweep.random=0", "lora.r=8,16"], "whole number from 1"),
        (["-m", "sweep.random=few", "lora.r=8,16"], "whole number from 1"),
        (["-m", "sweep.seed=1", "lora.r=8,16"], "seed of sweep.random"),
        (["-m", "sweep.zap=1", "lora.r=8,16"], "no such setting of a sweep"),
        (["-m", "sweep.random=3", "optim.lr=tag(log,interval(0,1))"], "begins above 0"),
        (["-m", "optim.lr=interval(0,1)"], "does not support sweep type"),
        (["sweep.random=3"], "add --multirun"),
    ],
)
def test_what_makes_no_points_is_refused(shell, argv, said):
    result = shell.run(*argv)
    assert result.status == 2
    assert said in result.err
    assert shell.calls == []
