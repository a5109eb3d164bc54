"""TRL holds adapters beside quantized weights in bfloat16; PEFT would resume them in float32, out of the optimizer."""

from __future__ import annotations

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_stopped_run_goes_on_bit_for_bit(server, place, tree, unequal, quantization, stop_at):
    tree = tree(
        f"model.quantization={quantization}",
        "lora.dropout=0.1",
        "training.max_steps=8",
        "training.save_steps=4",
        "training.logging_steps=1",
        "optim.lr=5e-3",
    )
    whole, stopped = place(tree, "whole"), place(tree, "stopped")
    assert server(whole).wait() == 0
    assert server(stopped, code=stop_at(3)).wait() == 130
    assert stopped.last_checkpoint().name in ("checkpoint-3", "checkpoint-4")
    assert server(stopped).wait() == 0
    assert unequal(whole, stopped) == []
