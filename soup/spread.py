"""How many devices a run takes: what one device would need, spread over the fewest that hold it. A pure function.

Weights, gradients and optimizer state are cut by all devices (ZeRO-3, arXiv:1910.02054), rows and their logits by those
of a ring (arXiv:2310.01889); every device pays for its libraries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SHARDED = ("weights", "gradients", "optimizer")
RINGED = ("activations", "logits")
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
            )
            if held <= capacity:
                sharded = shards and devices > 1
                return Spread(devices=devices, ring=ring, sharded=sharded, bytes=round(held))
            ring *= 2
        if not shards and not rings:
            break
        devices *= 2
    return Spread(devices=0, ring=1, sharded=False, bytes=0)
