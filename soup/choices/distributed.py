"""`distributed=`: how one run is spread over processes, and what they share out between them."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Ge

from soup.specs import DistributedSpec, Package

Count = Annotated[int, Ge(1)]
DEEPSPEED = (Package(distribution="deepspeed", extra="deepspeed"),)
PROBES = ("distributed:patience",)
STATE = ("gradients", "optimizer")
ALL = ("weights", *STATE)


def none(*, processes: Annotated[int, Ge(1)], nodes: Count) -> DistributedSpec:
    """One process."""
    return DistributedSpec(processes=processes, nodes=nodes)


def ddp(*, processes: Count, nodes: Count, timeout_s: Count) -> DistributedSpec:
    """A full copy in each process, gradients averaged (arXiv:2006.15704)."""
    return DistributedSpec(
        processes=processes, nodes=nodes, timeout_s=timeout_s, effects=PROBES, spread="ddp"
    )


def zero2(*, processes: Count, nodes: Count, timeout_s: Count) -> DistributedSpec:
    """DeepSpeed ZeRO stage 2 (arXiv:1910.02054): optimizer state and gradients are partitioned."""
    return _zero(processes, nodes, timeout_s, shards=STATE)


def zero3(*, processes: Count, nodes: Count, timeout_s: Count) -> DistributedSpec:
    """DeepSpeed ZeRO stage 3: parameters are partitioned too."""
    return _zero(processes, nodes, timeout_s, shards=ALL)


def zero2_offload(*, processes: Count, nodes: Count, timeout_s: Count) -> DistributedSpec:
    """ZeRO stage 2 with the optimizer and its state in host memory (arXiv:2101.06840)."""
    return _zero(processes, nodes, timeout_s, shards=STATE, offloads=("optimizer",))


def fsdp_full_shard(*, processes: Count, nodes: Count, timeout_s: Count) -> DistributedSpec:
    """FSDP2 (arXiv:2304.11277): parameters, gradients and optimizer state sharded, resharded after forward."""
    return _fsdp(processes, nodes, timeout_s, shards=ALL)


def fsdp_shard_grad(*, processes: Count, nodes: Count, timeout_s: Count) -> DistributedSpec:
    """FSDP2 that keeps gathered parameters between forward and backward: faster, more memory."""
    return _fsdp(processes, nodes, timeout_s, shards=STATE)


def fsdp_full_offload(*, processes: Count, nodes: Count, timeout_s: Count) -> DistributedSpec:
    """FSDP2 full sharding with parameters, gradients and optimizer state in host memory."""
    return _fsdp(processes, nodes, timeout_s, shards=ALL, offloads=ALL)


def _zero(processes: int, nodes: int, timeout_s: int, **shares: Any) -> DistributedSpec:
    return DistributedSpec(
        processes=processes,
        nodes=nodes,
        timeout_s=timeout_s,
        spread="deepspeed",
        requires=DEEPSPEED,
        effects=PROBES,
        **shares,
    )


def _fsdp(processes: int, nodes: int, timeout_s: int, **shares: Any) -> DistributedSpec:
    return DistributedSpec(
        processes=processes, nodes=nodes, timeout_s=timeout_s, spread="fsdp", effects=PROBES, **shares
    )
