"""Ring attention (Liu et al. 2023, arXiv:2310.01889): each process holds a part of a row, keys and values go round.

Registered with transformers under NAME, so that every model that asks its attention interface has it. Between
`laid` and its end a batch is a part of a row; outside of it rows are whole, and attention is torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from soup import ring
from soup.model import ring_kernels as kernels
from soup.ring import Block

NAME = "ring"


@dataclass(frozen=True)
class Ring:
    """`size` neighbouring processes; `rank` is this one's place among them, `group` None where it is alone."""

    size: int
    rank: int
    group: Any
    layout: str

    def peer(self, distance: int) -> int:
        """The rank in the world of the process that is `distance` places on."""
        return dist.get_global_rank(self.group, (self.rank + distance) % self.size)


@dataclass(frozen=True)
class Cut:
    """A row of `length` tokens, documents beginning at `starts`, cut for a ring."""

    ring: Ring
    length: int
    starts: tuple[int, ...]

    @cached_property
    def positions(self) -> list[int]:
        """Of the own part, in the row."""
        stretches = ring.part(self.length, self.ring.size, self.ring.rank, self.ring.layout)
        return [position for stretch in stretches for position in stretch]

    @cached_property
    def blocks(self) -> list[list[Block]]:
        """What to compute with the keys of each process, this one's first, then its predecessors'."""
        size, rank = self.ring.size, self.ring.rank
        owners = ((rank - step) % size for step in range(size))
        return [
            ring.blocks(self.length, self.starts, size, rank, owner, self.ring.layout) for owner in owners
        ]


_cut: Cut | None = None  # not of a thread: on a GPU, backward recomputes layers in another one


@contextmanager
def laid(cut: Cut) -> Iterator[None]:
    """Within, batches are this process's part of a row, backward too."""
    global _cut
    before, _cut = _cut, cut
    try:
        yield
    finally:
        _cut = before


def make(size: int, layout: str) -> Ring:
    """This process's ring: neighbouring ranks, so that it lies on one node if it can. All must call it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    return Ring(size, rank % size, groups[rank // size], layout)


def ring_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer, heads before tokens; the output has tokens before heads."""
    if _cut is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **given
        )
    window = given.get("sliding_window")
    for name, there in (
        ("dropout", dropout),
        ("softcap", given.get("softcap")),
        ("a sink", given.get("s_aux") is not None),
        ("a position bias", given.get("position_bias") is not None),
        ("a sliding window", window is not None and window < _cut.length),
        (
            "another mask than a causal one",
            not (given.get("is_causal") or getattr(module, "is_causal", True)),
        ),
    ):
        if there:
            raise NotImplementedError(f"ring attention has no {name}")
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, _cut, scale).transpose(1, 2), None


def attend(q: Tensor, k: Tensor, v: Tensor, cut: Cut, scale: float) -> Tensor:
    """Causal attention of the own queries to the whole row's keys, of which each process gives its own.

    Shapes: q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv) with Dv <= D; the output is (B, H, T, Dv).
    """
    width = v.shape[-1]
    if width < q.shape[-1]:  # latent attention's values are narrower than its keys
        v = pad(v, (0, q.shape[-1] - width))
    return _Attention.apply(q, k, v, cut, scale)[..., :width]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cut: Cut, scale: float) -> Tensor:
        q, k, v = (t.contiguous() for t in (q, k, v))
        out = torch.zeros_like(q, dtype=_wide(q))
        lse = q.new_full(q.shape[:3], float("-inf"), dtype=_wide(q))
        held: Sequence[Tensor] = (k, v)
        for step, blocks in enumerate(cut.blocks):
            coming = _send(held, cut.ring) if step + 1 < cut.ring.size else None
            for block in blocks:
                q_at, k_at = _at(block.q), _at(block.k)
                part, part_lse = kernels.forward(
                    q[q_at], held[0][k_at], held[1][k_at], causal=block.causal, scale=scale
                )
                _merge(out[q_at], lse[q_at], part, part_lse)
            if coming is not None:
                held = coming()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.cut, ctx.scale = cut, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of keys and values travel with them, and are home after a whole round."""
        q, k, v, out, lse = ctx.saved_tensors
        cut, grad = ctx.cut, grads[0].contiguous()
        dq = torch.zeros_like(q, dtype=_wide(q))
        held: Sequence[Tensor] = (k, v)
        summed: Sequence[Tensor] = [torch.zeros_like(t, dtype=_wide(t)) for t in held]
        arriving: Callable[[], list[Tensor]] | None = None
        for step, blocks in enumerate(cut.blocks):
            coming = _send(held, cut.ring) if step + 1 < cut.ring.size else None
            if arriving is not None:
                summed = arriving()
            for block in blocks:
                q_at, k_at = _at(block.q), _at(block.k)
                own = (grad[q_at], q[q_at], held[0][k_at], held[1][k_at], out[q_at], lse[q_at])
                part_q, part_k, part_v = kernels.backward(*own, causal=block.causal, scale=ctx.scale)
                dq[q_at] += part_q
                summed[0][k_at] += part_k
                summed[1][k_at] += part_v
            arriving = _send(summed, cut.ring)
            if coming is not None:
                held = coming()
        dk, dv = arriving() if arriving is not None else summed
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _wide(t: Tensor) -> torch.dtype:
    """What parts are summed in."""
    return torch.promote_types(t.dtype, torch.float32)


def _at(tokens: range) -> tuple[slice, slice, slice]:
    return slice(None), slice(None), slice(tokens.start, tokens.stop)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds attention to further keys, in place: the mean of both, weighed by their sums of exponents."""
    both = torch.logaddexp(lse, part_lse)
    out.mul_(torch.exp(lse - both)[..., None]).add_(part * torch.exp(part_lse - both)[..., None])
    lse.copy_(both)


def _send(tensors: Sequence[Tensor], among: Ring) -> Callable[[], Any]:
    """Sends to the next process and takes from the one before; what is returned waits, and gives what came."""
    if among.size == 1:
        return lambda: tensors
    received = [torch.empty_like(t) for t in tensors]
    to, of = among.peer(1), among.peer(-1)
    operations = [dist.P2POp(dist.isend, t, to, among.group) for t in tensors]
    operations += [dist.P2POp(dist.irecv, t, of, among.group) for t in received]
    works = dist.batch_isend_irecv(operations)

    def wait() -> list[Tensor]:
        for work in works:
            work.wait()
        return received

    return wait


def _mask(*given: Any, **named: Any) -> Tensor | None:
    """None while a row is cut: what a query sees follows from positions."""
    return None if _cut is not None else sdpa_mask(*given, **named)


AttentionInterface.register(NAME, ring_attention_forward)
AttentionMaskInterface.register(NAME, _mask)
