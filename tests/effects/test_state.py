"""Probes look and leave no trace: what comes after them is as if they had not been."""

from __future__ import annotations

import random

import numpy as np
import pytest


def _snapshot(built):
    import torch

    model, trainer = built.model, built.trainer
    return {
        "torch": torch.get_rng_state(),
        "numpy": [str(part) for part in np.random.get_state()],
        "python": random.getstate(),
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "buffers": {name: b.detach().clone() for name, b in model.named_buffers()},
        "grad": [name for name, p in model.named_parameters() if p.grad is not None],
        "requires_grad": [name for name, p in model.named_parameters() if p.requires_grad],
        "modes": {name: module.training for name, module in model.named_modules()},
        "checkpointing": {
            name: module.gradient_checkpointing
            for name, module in model.named_modules()
            if hasattr(module, "gradient_checkpointing")
        },
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in model.named_modules()
        },
        "forwards": [name for name, module in model.named_modules() if "forward" in vars(module)],
        "arguments": trainer.args.to_dict(),
        "state": vars(trainer.state).copy(),
        "config": model.config.to_dict(),
        "rows": trainer.train_dataset[:],
    }


def _differences(before, after):
    import torch

    def same(a, b):
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return [key for key in before if not same(before[key], after[key])]


@pytest.mark.parametrize(
    "overrides",
    [
        ("lora.dropout=0.1",),
        ("lora=none", "training.gradient_checkpointing=true"),
        ("lora=dora", "training.gradient_checkpointing=true"),
        ("model.quantization=4bit",),
        ("optim=adamw_8bit",),
        ("model.quantization=4bit", "model.quantization_aware=true", "lora=dora"),
        ("model.quantization=8bit", "model.quantization_aware=true", "lora=none"),
    ],
    ids=" ".join,
)
def test_proving_leaves_no_state(build, wrong, overrides):
    built = build(*overrides)
    before = _snapshot(built)
    assert wrong(built) == {}
    assert _differences(before, _snapshot(built)) == []
    assert not built.trainer.optimizer.state, "the optimizer has taken no step"
    assert built.trainer.lr_scheduler.last_epoch == 0


def test_a_snapshot_sees_a_trace(build):
    built = build()
    before = _snapshot(built)
    import torch

    torch.rand(1)
    next(built.model.parameters()).data += 1
    built.model.gradient_checkpointing_enable()
    built.trainer.args.learning_rate = 1.0
    changed = _differences(before, _snapshot(built))
    assert {"torch", "parameters", "checkpointing", "arguments"} <= set(changed)


@pytest.mark.parametrize(
    "overrides",
    [
        ("lora.dropout=0.2",),
        ("lora=none", "training.gradient_checkpointing=true", "training.gradient_accumulation_steps=2"),
        ("lora=dora", "training.gradient_checkpointing=true", "lora.dropout=0.2"),
    ],
    ids=" ".join,
)
def test_training_after_proving_is_the_same_training(build, wrong, overrides, tmp_path):
    losses = []
    for prove in (False, True, True):
        built = build(*overrides, "training.max_steps=5", "training.logging_steps=1", "optim.lr=1e-2")
        built.trainer.metrics_file = tmp_path / "metrics.jsonl"
        for _ in range(prove * 2):
            assert wrong(built) == {}
        built.trainer.train()
        logged = [line for line in built.trainer.state.log_history if "loss" in line]
        losses.append([(line["loss"], line["grad_norm"], line["learning_rate"]) for line in logged])
    assert len(losses[0]) == 5
    assert losses[0] == losses[1] == losses[2]
