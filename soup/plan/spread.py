"""How many devices a run takes: what one device would need, spread over the fewest that hold it. A pure function.

Weights, gradients and optimizer state are cut by all devices (ZeRO-3, arXiv:1910.02054), rows and their logits by those
of a ring (arXiv:2310.01889); every device pays for its libraries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from soup.device import Device
from soup.model import ring_fit
from soup.plan.decoder import Shape
from soup.plan.memory import SHARDED, peak, ring_bytes
from soup.rules import broken, facts
from soup.schema import Config

RINGED = ("activations", "logits")
ROUND = "ring"  # bytes that only a ring needs, over its processes
MOST = 2**20  # devices; beyond, nobody is helped


@dataclass(frozen=True, kw_only=True)
class Spread:
    """`devices` in all, `ring` of which share each row. `bytes`: what each then holds. `0` devices: none are enough."""

    devices: int
    ring: int
    sharded: bool
    bytes: int


def spread(whole: Mapping[str, float], capacity: float, *, shards: bool, rings: bool) -> Spread:
    """The fewest devices of `capacity` bytes, in powers of two, and the smallest ring among them.

    `whole`: bytes by what they are for, as one device would hold them. `shards`, `rings`: whether this run may be cut
    so. Of two ways with as many devices, the one with the smaller ring: a ring sends keys and values on in each layer.
    """
    devices = 1
    while devices <= MOST:
        ring = 1
        while ring <= (devices if rings else 1):
            held = sum(
                size / (devices if name in SHARDED and shards else ring if name in RINGED else 1)
                for name, size in whole.items()
                if name != ROUND
            )
            held += whole.get(ROUND, 0.0) / ring if ring > 1 else 0.0
            if held <= capacity:
                sharded = shards and devices > 1
                return Spread(devices=devices, ring=ring, sharded=sharded, bytes=round(held))
            ring *= 2
        if not shards and not rings:
            break
        devices *= 2
    return Spread(devices=0, ring=1, sharded=False, bytes=0)


def devices(
    config: Config,
    model: Mapping[str, Any],
    decoder: Shape,
    device: Device,
    row: int,
    dtype: str,
    *sizes: int,
) -> tuple[Spread, str]:
    """How many devices hold this run with rows of `row` tokens, where the rules let it be spread, and why so many."""
    alone = replace(
        config,
        distributed=replace(config.distributed, processes=1, nodes=1, shards=(), offloads=(), spread="none"),
        longctx=replace(config.longctx, use_ring_attention=False, ring_size=1),
    )
    capacity = device.memory_bytes

    def needed(checkpointing: bool, **allowed: bool) -> Spread:
        training = replace(config.training, gradient_checkpointing=checkpointing)
        several = replace(alone.backend, kernels="stock") if any(allowed.values()) else alone.backend
        whole, _ = peak(
            replace(alone, training=training, backend=several), decoder, device, row, dtype, *sizes
        )
        tokens = training.batch_size * (row + config.task.generates)
        whole[ROUND] = ring_bytes(decoder, tokens, 2 if device.bf16 and dtype != "float32" else 4)
        return spread(whole, capacity, **allowed)

    allowed = {"shards": False, "rings": False}
    found = needed(config.training.gradient_checkpointing, **allowed)
    if found.devices != 1:
        here = facts(config, device=device.kind, model_config=model)
        many = {"distributed": "zero3", "distributed.processes": 2, "distributed.world": 2}
        ring = {"longctx.use_ring_attention": True, "longctx.ring_size": 2}
        cuts = not broken(here | many | ring) and ring_fit.obstacle(model, row) is None
        allowed = {"shards": not broken(here | many), "rings": cuts}
        found = needed(config.training.gradient_checkpointing, **allowed)
    each = f"{capacity / 1e9:.0f} GB each ({device.memory_reason})"
    tokens = f"a batch of {config.training.batch_size} x {row + config.task.generates} tokens"
    if found.devices == 0:
        note = f"no number of devices of {each} holds {tokens}"
        if not allowed["rings"]:
            note += ": rows of this task, or of this model, are not spread over devices"
    elif found.devices == 1:
        note = f"one of {each} holds {tokens}"
    else:
        note = f"of {each} hold {tokens}: {found.bytes / 1e9:.0f} GB on each"
        note += f", with distributed=zero3 distributed.processes={found.devices}" if found.sharded else ""
        if found.ring > 1:
            note += f" longctx.use_ring_attention=true longctx.ring_size={found.ring}"
    if found.devices != 1 and not config.training.gradient_checkpointing:
        less = needed(True, **allowed).devices
        if less and (less < found.devices or not found.devices):
            note += f"; {less} with training.gradient_checkpointing=true"
    return found, note
