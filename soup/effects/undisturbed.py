"""The built model as probes measure it: in evaluation, in 32 bits where memory allows, and left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch

from soup.effects import as_it_was
from soup.effects.model import WHOLE_BYTES
from soup.train.forward import as_prepared

TOLERANCE = 1e-4  # relative, or of 1 for small losses
COARSE = 5e-2  # quantized weights, and those of 16 bits in a large model
KEPT = (
    "_metrics",
    "_stored_metrics",
    "_total_train_tokens",
    "_buffered_inputs",
    "_step",
)  # sums of TRL's trainers


def tolerance(built: Any) -> float:
    """How far a loss that is measured so may be off, over its size."""
    coarse = built.config.model.stored != "none" or too_large(built)
    return COARSE if coarse else TOLERANCE


@contextmanager
def undisturbed(built: Any) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards random state, modes and the trainer's sums are as they were."""
    trainer, model = built.trainer, built.model
    kept = {name: deepcopy(getattr(trainer, name)) for name in KEPT if name in vars(trainer)}
    try:
        with as_it_was(model), torch.no_grad(), _in_float32(built):
            model.eval()
            yield
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)


@contextmanager
def _in_float32(built: Any) -> Iterator[None]:
    """Policy, reference and PPO's scorers with weights and products of 32 bits: no difference drowns in rounding.

    Where that would take too much memory, the forward pass is that of training.
    """
    model, reference = built.model, getattr(built.trainer, "ref_model", None)
    if too_large(built):
        with as_prepared(model, built.trainer.accelerator):
            yield
        return
    beside = (getattr(built.trainer, name, None) for name in ("reward_model", "value_model"))
    models = [one for one in (model, reference, *beside) if one is not None]
    # What is frozen comes back from its copy, to the bit: 32 bits hold 16. Of the rest others hold views.
    alone = built.config.distributed.world == 1
    kept = [
        (p, p.dtype if alone and not p.requires_grad else p.data)
        for one in models
        for p in one.parameters()
        if p.is_floating_point()
    ]
    quantized = [m for one in models for m in one.modules() if hasattr(m, "compute_dtype")]
    dtypes = [m.compute_dtype for m in quantized]
    autocast = vars(reference).get("forward") if hasattr(reference, "_original_forward") else None
    for parameter, _ in kept:
        parameter.data = parameter.data.float()
    for module in quantized:
        module.compute_dtype = torch.float32
    if autocast is not None:
        reference.forward = reference._original_forward
    try:
        yield
    finally:
        for parameter, was in kept:
            parameter.data = parameter.data.to(was) if isinstance(was, torch.dtype) else was
        for module, dtype in zip(quantized, dtypes, strict=True):
            module.compute_dtype = dtype
        if autocast is not None:
            reference.forward = autocast


def too_large(built: Any) -> bool:
    """Whether the model is measured in training's own precision, for want of memory."""
    return sum(p.numel() for p in built.model.parameters() if p.is_floating_point()) * 4 > WHOLE_BYTES
