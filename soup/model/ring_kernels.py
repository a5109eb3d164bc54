"""Attention of a stretch of queries to a stretch of keys, with the log-sum-exp by which such parts are merged.

Shapes: q (B, H, T, D), k and v (B, G, S, D) with H a multiple of G (grouped queries), the log-sum-exp (B, H, T) in
float32. Backward takes output and log-sum-exp of the whole attention, as FlashAttention's does (arXiv:2307.08691).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 512  # queries that the plain kernel scores at once
LARGEST_HEAD = 256
_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_cuda = torch.ops.aten._scaled_dot_product_flash_attention
_cuda_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward


def kernel(q: Tensor) -> str:
    """The kernel that serves these queries: torch's flash kernels, or a plain one (float32 on a GPU)."""
    if q.device.type == "cpu":
        return "flash_cpu"
    half = q.dtype in (torch.float16, torch.bfloat16)
    return "flash_cuda" if half and q.shape[-1] % 8 == 0 and q.shape[-1] <= LARGEST_HEAD else "plain"


def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    kind = kernel(q)
    if kind == "flash_cpu":
        return _cpu(q, k, v, 0.0, causal, scale=scale)
    k, v = _repeated(k, q), _repeated(v, q)
    if kind == "flash_cuda":
        out, lse, *_ = _cuda(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    return plain(q, k, v, causal=causal, scale=scale)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from the gradient of the whole attention's output."""
    kind, groups = kernel(q), k.shape[1]
    if kind == "flash_cpu":
        return _cpu_backward(grad, q, k, v, out, lse, 0.0, causal, scale=scale)
    k, v = _repeated(k, q), _repeated(v, q)
    if kind == "flash_cuda":
        seed = torch.zeros(2, device=q.device, dtype=torch.uint64)  # of a dropout that is not there
        sizes = q.shape[2], k.shape[2]
        held = (t.contiguous() for t in (grad, q, k, v, out, lse))
        dq, dk, dv = _cuda_backward(
            *held, None, None, *sizes, 0.0, causal, seed, seed.new_zeros(1), scale=scale
        )
    else:
        dq, dk, dv = plain_backward(grad, q, k, v, out, lse, causal=causal, scale=scale)
    return dq, _summed(dk, groups), _summed(dv, groups)


def plain(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The definition, ROWS queries at a time."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    for at in range(0, q.shape[2], ROWS):
        rows = slice(at, at + ROWS)
        scores_BHTS = _scores(q[:, :, rows], k, at if causal else None, scale)
        lse[:, :, rows] = torch.logsumexp(scores_BHTS, -1)
        out[:, :, rows] = torch.softmax(scores_BHTS, -1).to(v.dtype) @ v
    return out, lse


def plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative of the definition, by the log-sum-exp of all keys."""
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for at in range(0, q.shape[2], ROWS):
        rows = slice(at, at + ROWS)
        own, given = q[:, :, rows], grad[:, :, rows]
        weights_BHTS = torch.exp(_scores(own, k, at if causal else None, scale) - lse[:, :, rows, None])
        inner_BHT1 = (given * out[:, :, rows]).sum(-1, keepdim=True).float()
        dscores = (weights_BHTS * ((given @ v.mT).float() - inner_BHT1) * scale).to(q.dtype)
        dq[:, :, rows] = dscores @ k
        dk += dscores.mT @ own
        dv += weights_BHTS.to(v.dtype).mT @ given
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, at: int | None, scale: float) -> Tensor:
    """Scaled products in float32; `at`: of the first query, where the mask is causal."""
    scores = (q @ k.mT).float() * scale
    if at is None:
        return scores
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(at)
    return scores.masked_fill(~seen, float("-inf"))


def _repeated(heads: Tensor, q: Tensor) -> Tensor:
    times = q.shape[1] // heads.shape[1]
    return heads if times == 1 else heads.repeat_interleave(times, 1)


def _summed(heads: Tensor, groups: int) -> Tensor:
    if heads.shape[1] == groups:
        return heads
    batch, _, length, width = heads.shape
    return heads.reshape(batch, groups, -1, length, width).sum(2)
