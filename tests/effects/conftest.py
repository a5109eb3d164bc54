"""Builds in this process, on the tiny model."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate and transformers keep the precision of a process's first run; soup has one run in a process."""
    import torch
    from accelerate.state import AcceleratorState, PartialState

    state, before, threads = torch.get_rng_state(), dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def build(tree, tmp_path) -> Callable[..., Any]:
    """`build("lora.r=4")`: what the training process holds before its first step."""

    def built(*overrides: str) -> Any:
        from soup import device, schema
        from soup.model import source
        from soup.train.build import build

        config = schema.check(tree(*overrides))
        return build(
            config,
            device=device.resolve("cpu"),
            model_folder=source.folder(config.model),
            output=tmp_path / "checkpoints",
        )

    return built


@pytest.fixture
def wrong() -> Callable[[Any], dict[str, Any]]:
    """The effects that `prove` finds not to be in force, by key."""

    def mismatches(built: Any) -> dict[str, Any]:
        from soup import effects

        return {effect.key: effect for effect in effects.prove(built) if not effect.ok}

    return mismatches
