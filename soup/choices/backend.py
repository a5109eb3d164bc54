"""`backend=`: the library that loads the model and runs its forward and backward passes."""

from __future__ import annotations

from typing import Literal

from soup.specs import BackendSpec, Package


def transformers(*, kernels: Literal["auto", "stock"]) -> BackendSpec:
    """transformers, TRL and PEFT."""
    return BackendSpec(unsloth=False, kernels=kernels, effects=("model:kernels",))


def unsloth(*, kernels: Literal["auto", "stock"]) -> BackendSpec:
    """Unsloth, imported before transformers in a process of its own. No GPU has run it here yet."""
    return BackendSpec(
        unsloth=True,
        kernels=kernels,
        requires=(Package(distribution="unsloth", extra="fast"),),
        effects=("unsloth:patches", "unsloth:kernels"),
    )
