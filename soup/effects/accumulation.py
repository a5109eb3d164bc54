"""Whether micro-steps add up to one step of their rows together: what the loop's own step leaves as a gradient."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from soup.effects import Effect
from soup.effects.moe import every_expert, unbalanced
from soup.effects.sources import cut, held
from soup.effects.task import first_batch, first_rows
from soup.effects.undisturbed import undisturbed

BRIEF = 64  # tokens
NEAR = 2e-2  # of the gradient, in 16 bits


def divided(built: Any) -> Iterator[Effect]:
    """A micro-step's gradient, of as many alike as are accumulated, must be its share of the loss's own gradient.

    Weights that are cut over processes, and rings, have an engine of their own that divides.
    """
    wanted = built.config.training.gradient_accumulation_steps
    if built.config.distributed.spread in ("fsdp", "deepspeed") or built.config.longctx.use_ring_attention:
        return
    if hasattr(built.trainer, "policy"):  # TRL's PPO has a loop of its own, and leaves it to accelerate
        one = torch.ones(1, device=built.trainer.args.device, requires_grad=True)
        built.trainer.accelerator.backward(one.sum())
        share, off = float(one.grad) / _scale(built), 0.0
    else:
        try:
            share, off = _share(built)
        except Exception as error:  # noqa: BLE001, a step that cannot be taken is refused as well
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            yield Effect("training.gradient_accumulation_steps", wanted, "no step", False, why)
            return
    ok = abs(share * wanted - 1) <= NEAR and off <= NEAR
    how = f"a micro-step's gradient is {share:.4g} of the loss's own, and {off:.1e} of it off in direction"
    found = round(1 / share, 3) if share else None
    yield Effect("training.gradient_accumulation_steps", wanted, wanted if ok else found, ok, how)


def _share(built: Any) -> tuple[float, float]:
    """Of the trained tensor with the largest gradient: the micro-step's over the loss's, and what is left of it."""
    trainer, model, steps = built.trainer, built.model, built.trainer.args.gradient_accumulation_steps
    generates = bool(built.config.task.generates)
    with undisturbed(built), unbalanced(trainer), every_expert(built), torch.enable_grad():
        shadow = copy.copy(trainer)  # which counts steps and tokens, and tells the watchdog
        shadow.state, shadow.watchdog = copy.copy(trainer.state), None
        shadow.optimizer, shadow.current_gradient_accumulation_steps = SimpleNamespace(), steps
        batch = first_batch(built) if generates else _batch(built)
        parameters = [p for p in model.parameters() if p.requires_grad]
        try:
            model.train()
            model.training = not generates  # by which GRPO knows whether it accumulates
            torch.manual_seed(0)
            with trainer.compute_loss_context_manager():
                shadow.compute_loss(model, dict(batch)).backward()
            largest = max((p for p in parameters if p.grad is not None), key=lambda p: float(p.grad.norm()))
            whole = largest.grad.detach().double().clone()
            for parameter in parameters:
                parameter.grad = None
            items = None
            given: Any = dict(batch)
            if generates:  # it makes its batches of rows; their tokens are those of all micro-steps
                batch["num_items_in_batch"] = batch["num_items_in_batch"] * steps
                shadow._prepare_inputs, given = lambda _: dict(batch), []
            else:
                _, items = trainer.get_batch_samples(iter([batch] * steps), steps, trainer.args.device)
            torch.manual_seed(0)
            shadow.training_step(model, given, items)
            part = largest.grad.detach().double() / _scale(built)
        finally:
            for parameter in parameters:
                parameter.grad = None
    share = float((part * whole).sum() / whole.pow(2).sum())
    return share, float((part - share * whole).norm() / part.norm().clamp(min=1e-30))


def _scale(built: Any) -> float:
    """Of losses in float16, whose gradients would be too small."""
    scaler = built.trainer.accelerator.scaler
    return 1.0 if scaler is None else float(scaler.get_scale())


def _batch(built: Any) -> dict[str, Any]:
    """The shortest of the first rows, of which BRIEF tokens are enough; of rated answers both kinds."""
    rows = first_rows(held(built))
    if "labels" in rows[0]:
        rows = [cut(row, BRIEF) for row in rows]
    if "label" not in rows[0]:
        rows = [min(rows, key=_tokens)]
    return dict(built.trainer._prepare_inputs(built.trainer.data_collator([dict(row) for row in rows])))


def _tokens(row: Mapping[str, Any]) -> int:
    return sum(len(value) for name, value in row.items() if name.endswith("_ids"))
