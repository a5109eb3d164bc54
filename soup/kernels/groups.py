"""GRPO's log-probabilities of the answers it drew, by `soup.kernels.answers`: a group's prompt passes the model once,
and no logits are kept. The loss itself is TRL's.

Positions count from a prompt's first token; TRL 1.12 counts its padding too, which rotary embeddings do not see.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from soup.kernels import answers
from soup.kernels.answers import placed


def put_on(trainer: Any) -> int | str:
    """1, or why the trainer's log-probabilities stay TRL's."""
    if not isinstance(trainer, GRPOTrainer):
        return f"{type(trainer).__name__} computes another loss"
    if trainer._entropy_bonus_enabled:
        return "the entropy is part of it"
    if (why := answers.put_on(trainer)) is not None:
        return why
    trainer._get_per_token_logps_and_entropies = MethodType(_log_probabilities, trainer)
    return 1


def _log_probabilities(
    self: Any,
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    batch_size: int | None = None,
    compute_entropy: bool = False,
    compute_aux_loss: bool = False,
    **images: Any,
) -> Any:
    """In the place of TRL's: (B, answers' columns) log-probabilities and entropies, 0 where there is padding."""
    if compute_aux_loss or self._entropy_bonus_enabled or any(one is not None for one in images.values()):
        given = input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss
        return type(self)._get_per_token_logps_and_entropies(self, model, *given, **images)
    asked_BT = torch.zeros_like(attention_mask)
    asked_BT[:, -logits_to_keep:] = attention_mask[:, -logits_to_keep:]
    logps, entropies = [], []
    for part in torch.arange(len(input_ids)).split(batch_size or len(input_ids)):
        shape = torch.Size((len(part), input_ids.shape[1]))
        found = model(
            input_ids=input_ids[part],
            attention_mask=attention_mask[part],
            completion_mask=asked_BT[part],
            temperature=self.temperature,
        )
        logps.append(placed(found, shape)[:, -logits_to_keep:])
        entropies.append(placed(found, shape, "entropy_N")[:, -logits_to_keep:])
    return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None
