"""Frozen layers are the same to the bit after training, and have no adapters."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize("lora", ["lora", "none"])
def test_the_bottom_layer_stays_as_it_was(tree, place, server, tiny_model, lora):
    import torch
    from safetensors.torch import load_file

    run = place(tree(f"lora={lora}", "training.freeze_layers=1", "optim.lr=1e-2"))
    process = server(run)
    assert process.wait() == 0, process.stdout.read()
    [file] = run.model.glob("*.safetensors")
    saved = load_file(file)
    if lora == "lora":
        assert saved and all(".layers.1." in name for name in saved)
        return
    base = load_file(tiny_model / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], saved[name])}
    assert not any(".layers.0." in name for name in changed)
    assert {name for name in base if ".layers.1." in name} <= changed
    assert "model.embed_tokens.weight" in changed


def test_adapters_that_would_all_lie_on_frozen_layers_are_refused(tree, place, server):
    words = ("training.freeze_layers=1", "lora.target_modules=[layers.0.mlp.down_proj]")
    run = place(tree(*words))
    assert server(run).wait() == 2
    assert run.result()["error"].startswith("lora.target_modules")


TASKS = ("pretrain", "dpo", "ipo", "kto", "orpo", "simpo", "reward", "grpo")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_proves_the_features_of_the_loop(tree, place, server, task):
    """A frozen layer, noise, the watchdog and rsLoRA at once, and two steps."""
    words = (
        "lora=rslora",
        "training.freeze_ratio=0.5",
        "training.neftune_alpha=5.0",
        "training.loss_watchdog=true",
        "training.max_steps=2",
    )
    run = place(tree(f"task={task}", *words))
    process = server(run)
    assert process.wait() == 0, process.stdout.read()
    assert all(effect["ok"] for effect in json.loads(run.effective.read_text()).values())
