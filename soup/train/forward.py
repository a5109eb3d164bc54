"""The forward pass as accelerate makes it for training, where a trainer uses the model before that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import convert_outputs_to_fp32


@contextmanager
def as_prepared(model: Any, accelerator: Any) -> Iterator[None]:
    """Autocast within, float32 results. Logits of 16 bits would round TRL's sums of log-probabilities to whole nats."""
    if accelerator.mixed_precision == "no" or hasattr(
        model, "_original_forward"
    ):  # accelerate's own is there
        yield
        return
    forward, own = model.forward, "forward" in vars(model)

    def within(*inputs: Any, **named: Any) -> Any:
        with accelerator.autocast():
            return forward(*inputs, **named)

    model.forward = convert_outputs_to_fp32(within)
    try:
        yield
    finally:
        if own:
            model.forward = forward
        else:
            del model.forward
