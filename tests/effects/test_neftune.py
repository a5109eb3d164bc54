"""NEFTune's noise is in the passes that learn, of the paper's size, and in no other, for every task."""

from __future__ import annotations

from pathlib import Path

import pytest

TASKS = ("sft", "pretrain", "dpo", "ipo", "kto", "orpo", "simpo", "reward", "grpo")


@pytest.mark.parametrize("lora", ["lora", "none"])
@pytest.mark.parametrize("task", TASKS)
def test_noise_in_passes_that_learn_only(build, task, lora):
    """Trains real steps and looks at every pass of the embedding."""
    import torch

    alpha = 20.0
    built = build(f"task={task}", f"lora={lora}", f"training.neftune_alpha={alpha}", "training.max_steps=2")
    from soup import effects

    assert [one for one in effects.prove(built) if not one.ok] == []
    embedding = built.model.get_input_embeddings()
    learnt, quiet = [], []

    def seen(module, inputs, output_BTD):
        clean_BTD = torch.nn.functional.embedding(inputs[0], module.weight)
        size = float((output_BTD - clean_BTD).detach().abs().max())
        if module.training and torch.is_grad_enabled():
            learnt.append(size * (output_BTD.shape[1] * output_BTD.shape[2]) ** 0.5)
        else:
            quiet.append(size)

    embedding.register_forward_hook(seen)
    built.trainer.metrics_file = Path(built.trainer.args.output_dir, "metrics.jsonl")
    built.trainer.train()
    assert learnt and all(0.9 * alpha <= size <= 1.01 * alpha for size in learnt)
    assert not any(quiet)
    assert quiet or task not in ("grpo", "dpo", "ipo", "kto")


@pytest.mark.parametrize("alpha", [0.0, 0.1, 5.0, 50.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_size_is_proved_in_every_precision(build, wrong, dtype, alpha):
    assert wrong(build(f"model.dtype={dtype}", f"training.neftune_alpha={alpha}")) == {}
