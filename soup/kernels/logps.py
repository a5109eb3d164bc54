"""Log-probabilities of labels from hidden states through the output head, without keeping logits.

For a token with hidden state h (D) and label y, logits z = W h (V), p = softmax(z), and g the gradient of its result:
    logp = z_y - log sum exp z,   dh = g W^T (e_y - p),   dW += g (e_y - p) h^T
dh is linear in g, so a frozen head's is formed in the forward pass, while the logits are there, and scaled in backward.
A head that trains needs g first: its logits are computed again, CHUNK tokens at a time (arXiv:2410.10989, section 3.2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from soup.kernels.loss import BLOCK, CHUNK


class Tokens(NamedTuple):
    """Of each token, in float32; the last three have no gradient. `level`: mean of its logits."""

    logp_N: Tensor
    right_N: Tensor
    entropy_N: Tensor
    level_N: Tensor


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        inputs_ND, cast_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        found_4N = torch.empty(4, len(label_N), dtype=torch.float32, device=hidden_ND.device)
        formed = wants_hidden and not wants_weight
        dhidden_ND = torch.empty_like(inputs_ND) if formed else None
        for start in range(0, len(label_N), CHUNK):
            part = slice(start, start + CHUNK)
            logits_CV = inputs_ND[part] @ cast_VD.T
            _look(logits_CV, label_N[part], found_4N[:, part], formed)
            if dhidden_ND is not None:
                torch.mm(logits_CV, cast_VD, out=dhidden_ND[part])
        ctx.kinds = hidden_ND.dtype, weight_VD.dtype, dtype
        if formed:
            ctx.save_for_backward(dhidden_ND)
        elif wants_weight:
            ctx.save_for_backward(hidden_ND, weight_VD, label_N)
        found = found_4N.unbind()
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    def backward(ctx: Any, g_N: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, dtype = ctx.kinds
        if len(ctx.saved_tensors) == 1:
            (dhidden_ND,) = ctx.saved_tensors
            return (dhidden_ND * g_N[:, None]).to(hidden), None, None, None
        hidden_ND, weight_VD, label_N = ctx.saved_tensors
        inputs_ND, cast_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        dhidden_ND, dweight_VD = torch.empty_like(inputs_ND), torch.zeros_like(weight_VD)
        for start in range(0, len(label_N), CHUNK):
            part = slice(start, start + CHUNK)
            logits_CV = inputs_ND[part] @ cast_VD.T
            _look(logits_CV, label_N[part], None, gradient=True)
            logits_CV *= g_N[part, None]
            torch.mm(logits_CV, cast_VD, out=dhidden_ND[part])
            dweight_VD += logits_CV.T @ inputs_ND[part]
        return dhidden_ND.to(hidden), dweight_VD.to(weight), None, None


def _look(logits_CV: Tensor, label_C: Tensor, found_4C: Tensor | None, gradient: bool) -> None:
    """Writes what `Tokens` has of each, and the gradient of its log-probability in the place of the logits."""
    for start in range(0, len(label_C), BLOCK):
        part = slice(start, start + BLOCK)
        logits_BV, label_B1 = logits_CV[part], label_C[part, None]
        log_BV = torch.log_softmax(logits_BV, -1, dtype=torch.float32)
        p_BV = log_BV.exp()
        if found_4C is not None:
            chosen_B = log_BV.gather(1, label_B1)[:, 0]
            found_4C[0, part] = chosen_B
            found_4C[1, part] = (log_BV.argmax(-1) == label_B1[:, 0]).float()
            found_4C[2, part] = -torch.linalg.vecdot(p_BV, log_BV)
            found_4C[3, part] = logits_BV.mean(-1, dtype=torch.float32)
        if gradient:
            p_BV.scatter_add_(1, label_B1, p_BV.new_full((1, 1), -1.0).expand_as(label_B1))
            logits_BV.copy_(p_BV.neg_())


def log_probabilities(hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor) -> Tokens:
    """hidden_ND[i] predicts label_N[i]. Products are in autocast's type, else float32."""
    kind = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    with torch.autocast(kind, enabled=False):
        return Tokens(*_LogProbabilities.apply(hidden_ND, weight_VD, label_N, dtype))
