"""Answers on the fast path against TRL's: the same loss, metrics and gradients, for the policy and its reference."""

from __future__ import annotations

import pytest
import torch

from tests.effects.test_architectures import FAMILIES, family  # noqa: F401

EXACT = ("model.dtype=float32", "training.batch_size=3")
JOBS = {
    "dpo": ("task=dpo",),
    "dpo, smoothed": ("task=dpo", "task.label_smoothing=0.2"),
    "dpo, a frozen copy": ("task=dpo", "lora=none"),
    "dpo, a table": ("task=dpo", "task.precompute_ref=true"),
    "ipo": ("task=ipo",),
    "ipo, a frozen copy": ("task=ipo", "lora=none", "training.gradient_checkpointing=true"),
    "kto": ("task=kto", "task.undesirable_weight=1.5"),
    "kto, a frozen copy": ("task=kto", "lora=none", "training.gradient_checkpointing=true"),
    "kto, a table": ("task=kto", "task.precompute_ref=true"),
    "orpo": ("task=orpo",),
    "orpo, all weights": ("task=orpo", "lora=none"),
    "simpo": ("task=simpo",),
    "dpo, dropout": ("task=dpo", "lora.dropout=0.1"),
}


def move_off_the_reference(model):
    with torch.no_grad():
        for place, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p += 0.02 * torch.sin(torch.arange(p.numel(), dtype=p.dtype) + place).view_as(p)


def assert_same_gradients(gradients, wanted):
    for name, gradient in gradients.items():
        theirs = wanted[name]
        torch.testing.assert_close(
            gradient, theirs, rtol=1e-3, atol=1e-5 * max(1.0, float(theirs.abs().max()))
        )


def step(built):
    """Loss of the first training batch, its metrics, and gradients; the adapters are moved off the reference before."""
    trainer, model = built.trainer, built.model
    move_off_the_reference(model)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    model.train()
    torch.manual_seed(3)
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    stored = trainer._metrics if hasattr(trainer, "_metrics") else trainer._stored_metrics
    metrics = {name: values[-1] for name, values in stored["train"].items()}
    if not hasattr(trainer, "_metrics"):  # ORPO's and CPO's are means over padding too
        del metrics["logits/chosen"], metrics["logits/rejected"]
    return loss.item(), metrics, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def same_step(build, *words):
    built = build(*words, "backend.kernels=auto")
    kernels = {part.name: part for part in built.kernels}
    loss, metrics, gradients = step(built)
    wanted, wanted_metrics, wanted_gradients = step(build(*words, "backend.kernels=stock"))
    assert loss == pytest.approx(wanted, rel=1e-4)
    assert list(metrics) == list(wanted_metrics)
    assert metrics == pytest.approx(wanted_metrics, rel=1e-4, abs=1e-4)
    assert_same_gradients(gradients, wanted_gradients)
    return kernels


@pytest.mark.parametrize("words", JOBS.values(), ids=JOBS)
def test_a_step_is_that_of_the_stock_path(build, words):
    kernels = same_step(build, *EXACT, *words)
    assert kernels["loss"].count == 1
    assert bool(kernels["documents"].count) == ("lora.dropout=0.1" not in words)


@pytest.mark.parametrize("task", ["dpo", "kto", "orpo", "simpo"])
def test_beside_quantized_weights(build, task):
    words = (f"task={task}", "model.quantization=4bit", "training.batch_size=3")
    built = build(*words, "model.dtype=bfloat16")
    kernels = {part.name: part for part in built.kernels}
    assert kernels["loss"].count == 1
    loss, _, gradients = step(built)
    # TRL rounds sums of 16 bits to a tenth of a nat and more; here they are of 32 bits.
    wanted, _, theirs = step(build(*words, "model.dtype=float32", "backend.kernels=stock"))
    assert loss == pytest.approx(wanted, rel=1e-2)
    for name, gradient in gradients.items():
        assert (gradient - theirs[name]).norm() <= 0.1 * theirs[name].norm() + 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "kto", "orpo"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_other_families(build, family, name, task):  # noqa: F811
    kernels = same_step(build, *EXACT, f"task={task}", f"model.base={family(name)}")
    if name in ("qwen2", "qwen3", "mistral", "phi3", "olmo2", "llama, scaled"):
        assert kernels["loss"].count and kernels["documents"].count
