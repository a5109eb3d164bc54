"""Points of the matrix on other families of models: each trains with all effects proved, or is refused before anything
is loaded."""

from __future__ import annotations

import json
import random

import pytest

from soup.cli.check import checked
from soup.cli.compose import Point
from soup.errors import Refused
from tests.effects.test_architectures import FAMILIES, family  # noqa: F401
from tests.train.test_matrix import POINTS

SEED, EACH = 11, 3
ALONE = [
    number for number, point in enumerate(POINTS) if "task=ppo" not in point
]  # which needs a second model
DRAWN = [
    (name, number)
    for place, name in enumerate(FAMILIES)
    for number in random.Random(SEED + place).sample(ALONE, EACH)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), DRAWN)
def test_it_trains_or_is_refused(tree, place, server, family, name, number):  # noqa: F811
    words = [*" ".join(POINTS[number]).split(), f"model.base={family(name)}"]
    if "task=grpo" in words:
        words += ["task.max_completion_length=8"]
    composed = tree(*words)
    (found,) = checked([Point(tree=composed, choices={}, overrides=tuple(words))], train=True)
    if isinstance(found, Refused):
        assert all(problem.why and problem.fix for problem in found.problems)
        return
    run = place(composed)
    process = server(run)
    assert process.wait() == 0, process.stdout.read()
    wrong = {key: one for key, one in json.loads(run.effective.read_text()).items() if not one["ok"]}
    assert wrong == {}
