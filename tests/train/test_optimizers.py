"""Every optimizer trains: the loss falls, a stopped run goes on bit for bit, and its state is what the plan counts."""

from __future__ import annotations

import json

import pytest

from tests.train.test_quantized_resume import STOP

LEARNS = {"adafactor": 1e-2, "adamw_8bit": 5e-3, "lion": 1e-3}


QUICK = (("adafactor", "none"), ("adamw_8bit", "none"), ("lion", "loraplus"))
MORE = (
    ("adafactor", "lora"),
    ("adamw_8bit", "lora"),
    ("lion", "lora"),
    ("lion", "none"),
    ("adamw", "loraplus"),
)


@pytest.mark.parametrize(
    ("optim", "lora"), [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE)]
)
def test_it_learns_and_goes_on_bit_for_bit(server, place, tree, unequal, optim, lora):
    tree = tree(
        f"optim={optim}",
        f"lora={lora}",
        f"optim.lr={LEARNS.get(optim, 1e-3)}",
        "optim.weight_decay=0.1",
        "training.max_steps=8",
        "training.save_steps=4",
        "training.logging_steps=1",
    )
    whole, stopped = place(tree, "whole"), place(tree, "stopped")
    assert server(whole).wait() == 0
    assert server(stopped, code=STOP).wait() == 130
    assert server(stopped).wait() == 0
    assert unequal(whole, stopped) == []
    logged = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
    losses = [line["loss"] for line in logged if "loss" in line]
    assert sum(losses[-2:]) < sum(losses[:2]) - 0.1
