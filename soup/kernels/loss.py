"""Cross entropy of hidden states through the output head, without keeping logits: their gradient in the same pass.

For a learnt token with hidden state h (D) and label y, logits z = W h (V), p = softmax(z):
    loss = -log p_y,   dh = W^T (p - e_y),   dW += (p - e_y) h^T
(Liger, arXiv:2410.10989, section 3.2; Cut Cross-Entropy, arXiv:2411.09009). Tokens without a label never reach the
head; CHUNK of the others do at once; a frozen head gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 256  # tokens whose logits exist at once: enough for the head's product to be fast
BLOCK = 16  # of these, tokens that go through the softmax at once: their logits stay in the processor's cache
IGNORED = -100


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden (N, D), weight (V, D), labels (N,) to sums over N: loss, right predictions, entropies, in float32."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        sums = torch.zeros(3, dtype=torch.float32, device=hidden_ND.device)
        inputs_ND, cast_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        dhidden_ND = torch.empty_like(inputs_ND) if wants_hidden else None
        dweight_VD = torch.zeros_like(weight_VD) if wants_weight else None
        for start in range(0, len(label_N), CHUNK):
            part = slice(start, start + CHUNK)
            logits_CV = inputs_ND[part] @ cast_VD.T
            _losses_and_gradients(logits_CV, label_N[part], sums)
            if dhidden_ND is not None:
                torch.mm(logits_CV, cast_VD, out=dhidden_ND[part])
            if dweight_VD is not None:
                dweight_VD += logits_CV.T @ inputs_ND[part]
        ctx.kinds = hidden_ND.dtype, weight_VD.dtype
        ctx.save_for_backward(dhidden_ND, dweight_VD)
        loss, correct, entropy = sums.unbind()
        ctx.mark_non_differentiable(correct, entropy)
        return loss, correct, entropy

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_ND, dweight_VD = ctx.saved_tensors
        hidden, weight = ctx.kinds
        return (
            None if dhidden_ND is None else (dhidden_ND * scale).to(hidden),
            None if dweight_VD is None else (dweight_VD * scale).to(weight),
            None,
            None,
        )


def _losses_and_gradients(logits_CV: Tensor, label_C: Tensor, sums: Tensor) -> None:
    """Adds to `sums`, and overwrites the logits by the gradient of the losses' sum."""
    for logits_BV, label_B in zip(logits_CV.split(BLOCK), label_C.split(BLOCK), strict=True):
        log_BV = torch.log_softmax(logits_BV, -1, dtype=torch.float32)
        chosen_B1 = label_B[:, None]
        sums[0] -= log_BV.gather(1, chosen_B1).sum()
        sums[1] += (log_BV.argmax(-1) == label_B).sum()  # of bfloat16 it takes six times as long
        p_BV = log_BV.exp()
        sums[2] -= torch.dot(p_BV.view(-1), log_BV.view(-1))
        p_BV.scatter_add_(1, chosen_B1, p_BV.new_full((1, 1), -1.0).expand_as(chosen_B1))
        logits_BV.copy_(p_BV)


def cross_entropy(
    hidden_KD: Tensor, weight_VD: Tensor, place_N: Tensor, label_N: Tensor, items: Tensor | int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss over `items` (the number of learnt tokens if `None`); right predictions, entropies, learnt tokens.

    hidden_KD[place_N[i]] predicts label_N[i]; where that is IGNORED nothing is computed. Products are in autocast's
    type, else float32, as TRL's are.
    """
    learnt = label_N != IGNORED
    kind = hidden_KD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    with torch.autocast(kind, enabled=False):
        loss, correct, entropy = _LinearCrossEntropy.apply(
            hidden_KD.index_select(0, place_N[learnt]), weight_VD, label_N[learnt], dtype
        )
    count = learnt.sum()
    loss = loss / (count.clamp(min=1) if items is None else torch.as_tensor(items, device=loss.device))
    return loss, correct, entropy, count
