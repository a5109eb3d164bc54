"""GRPO's log-probabilities on the fast path against TRL's: the same answers, loss, metrics and gradients."""

from __future__ import annotations

import pytest
import torch

from tests.train.test_fast_answers import assert_same_gradients, move_off_the_reference
from tests.train.test_prefixes import embedded

EXACT = ("task=grpo", "model.dtype=float32", "training.batch_size=4", "task.num_generations=4")
JOBS = {
    "adapters": (),
    "several prompts": ("training.batch_size=8", "task.beta=0.1"),
    "a frozen copy": ("lora=none", "task.beta=0.1"),
    "another temperature": ("task.temperature=0.7", "task.beta=0.1"),
    "recomputed": ("training.gradient_checkpointing=true",),
    "accumulated": ("training.gradient_accumulation_steps=2",),
}


def step(built):
    """Answers that are drawn for the first batch, their loss, its metrics, and gradients."""
    trainer, model = built.trainer, built.model
    move_off_the_reference(model)
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    model.train()
    torch.manual_seed(3)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    batch["advantages"] = torch.linspace(-1, 1, len(batch["advantages"]))  # answers of one score have none
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if "time" not in name}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return batch["completion_ids"], loss.item(), metrics, gradients


@pytest.mark.parametrize("words", JOBS.values(), ids=JOBS)
def test_a_step_is_that_of_the_stock_path(build, words):
    built = build(*EXACT, *words)
    kernels = {part.name: part for part in built.kernels}
    assert all(kernels[name].count for name in ("loss", "documents", "prefixes"))
    drawn, loss, metrics, gradients = step(built)
    stock = build(*EXACT, *words, "backend.kernels=stock")
    assert not any(part.count for part in stock.kernels)
    wanted_drawn, wanted, wanted_metrics, wanted_gradients = step(stock)
    assert torch.equal(drawn, wanted_drawn)
    assert loss == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert metrics == pytest.approx(wanted_metrics, rel=1e-4, abs=1e-4)
    assert_same_gradients(gradients, wanted_gradients)


def test_a_prompt_passes_once_for_all_of_its_answers(build):
    built = build(*EXACT)
    trainer = built.trainer
    ids_BT = torch.cat([torch.arange(40).expand(4, -1), torch.arange(40, 48).view(4, 2)], 1)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, -1] = 0  # an answer that ended
    with embedded(built.model) as seen:
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids_BT, mask_BT, 2, compute_entropy=True
        )
    assert seen == [40 + 4 * 2 - 1] and logps.shape == entropies.shape == (4, 2)
    logits = trainer.model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, -3:-1] / trainer.temperature
    wanted = logits.log_softmax(-1)
    wanted_logps, there = wanted.gather(2, ids_BT[:, -2:, None])[..., 0], mask_BT[:, -2:]
    torch.testing.assert_close(logps, wanted_logps * there, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropies, -(wanted * wanted.exp()).sum(-1) * there, rtol=1e-4, atol=1e-4)
