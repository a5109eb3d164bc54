"""Groups of a layer's inputs that share a scale: whether they come out even. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping

from soup.errors import Problem, Refused
from soup.specs import ModelSpec


def whole_groups(spec: ModelSpec, inputs: Mapping[str, int]) -> None:
    """Refuses a group size that does not divide the inputs of every layer, given by name."""
    size = spec.quantization_group_size
    uneven = {name: count for name, count in inputs.items() if count % size}
    if uneven:
        fits = next((s for s in (128, 64, 32, 16, 8, 4, 2) if not any(c % s for c in inputs.values())), None)
        name, count = next(iter(uneven.items()))
        raise Refused(
            Problem(
                key="model.quantization_group_size",
                value=size,
                why=f"does not divide the {count} inputs of {name}",
                fix="model.quantization_aware=false"
                if fits is None
                else f"model.quantization_group_size={fits}",
            )
        )
