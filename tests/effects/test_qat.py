"""Quantization that is simulated while training: in force wherever it is asked for, and seen where it is not."""

from __future__ import annotations

import pytest

AWARE = ("model.quantization=4bit", "model.quantization_aware=true")
EIGHT = ("model.quantization=8bit", "model.quantization_aware=true")
HONEST = {
    "4 bits": AWARE,
    "8 bits": EIGHT,
    "groups of 16": (*AWARE, "model.quantization_group_size=16"),
    "8 bits in groups of 64": (*EIGHT, "model.quantization_group_size=64"),
    "dora": (*AWARE, "lora=dora", "lora.target_modules=[q_proj,down_proj]"),
    "rslora with dropout": (*AWARE, "lora=rslora", "lora.dropout=0.1"),
    "loraplus": (*EIGHT, "lora=loraplus"),
    "all weights": (*AWARE, "lora=none"),
    "8 bits, all weights": (*EIGHT, "lora=none"),
    "bfloat16": (*AWARE, "model.dtype=bfloat16"),
    "8 bits, bfloat16, all weights": (*EIGHT, "model.dtype=bfloat16", "lora=none"),
    "8 bits, bfloat16": (*EIGHT, "model.dtype=bfloat16"),
    "float32": (*EIGHT, "model.dtype=float32"),
    "checkpointing": (*AWARE, "training.gradient_checkpointing=true", "lora=dora"),
    "checkpointing, all weights": (*AWARE, "training.gradient_checkpointing=true", "lora=none"),
    "frozen layer": (*AWARE, "training.freeze_layers=1"),
    "frozen layer, all weights": (*AWARE, "training.freeze_layers=1", "lora=none"),
    "noise": (*AWARE, "training.neftune_alpha=5.0"),
    "GaLore": (*AWARE, "lora=none", "optim=galore", "optim.galore_rank=8"),
    "packed": (*AWARE, "task=pretrain", "training.packing=true"),
}


@pytest.mark.parametrize("overrides", HONEST.values(), ids=HONEST.keys())
def test_every_setting_is_in_force(build, wrong, overrides):
    assert wrong(build(*overrides)) == {}
