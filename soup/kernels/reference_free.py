"""What ORPO's and SimPO's losses read of a pair, from log-probabilities (`soup.kernels.answers`): means of answers, and
the negative log-likelihood of the chosen rows where the loss has that term. The losses themselves are TRL's.

TRL 1.12 writes `logits/chosen` and `logits/rejected` as means over all tokens, padding too; here they are of the tokens
that the loss reads.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from soup.kernels import answers
from soup.kernels.answers import placed
from soup.kernels.loss import IGNORED


def put_on(trainer: Any) -> int | str:
    """1, or why the trainer's loss stays TRL's."""
    if not isinstance(trainer, (CPOTrainer, ORPOTrainer)):
        return f"{type(trainer).__name__} computes another loss"
    if not _known(trainer):
        return f"the loss is {trainer.loss_type} with cpo_alpha={trainer.cpo_alpha:g}"
    if (why := answers.put_on(trainer)) is not None:
        return why
    trainer.concatenated_forward = MethodType(_concatenated_forward, trainer)
    return 1


def _known(trainer: Any) -> bool:
    return isinstance(trainer, ORPOTrainer) or trainer.loss_type == "simpo" and trainer.cpo_alpha == 0


def _concatenated_forward(self: Any, model: Any, batch: dict[str, Tensor]) -> Any:
    """In the place of TRL's: log-probabilities of chosen and rejected answers, levels of their logits, and the negative
    log-likelihood of whole chosen rows."""
    if self.aux_loss_enabled or not _known(self):
        return type(self).concatenated_forward(self, model, batch)
    rows = self.concatenated_inputs(batch, device=self.accelerator.device)
    half, shape = len(batch["chosen_labels"]), rows["concatenated_labels"].shape
    answer_RT = rows["concatenated_labels"] != IGNORED
    asked_RT = answer_RT.clone()
    if isinstance(self, ORPOTrainer):  # equation 6 of arXiv:2403.07691; TRL has the prompt's tokens in it too
        asked_RT[:half] |= rows["concatenated_attention_mask"][:half].bool()
    found = model(
        input_ids=rows["concatenated_input_ids"],
        attention_mask=rows["concatenated_attention_mask"],
        completion_mask=asked_RT,
    )
    logp_RT = placed(found, shape)
    mean_R = (logp_RT * answer_RT).sum(1) / answer_RT[:, 1:].sum(1)
    if isinstance(self, ORPOTrainer):
        likelihood = -logp_RT[:half].sum() / asked_RT[:half, 1:].sum()
    else:
        likelihood = logp_RT.new_zeros(())
    of_chosen_N = found["row_N"] < half
    levels = found["level_N"][of_chosen_N], found["level_N"][~of_chosen_N]
    return mean_R[:half], mean_R[half:], *levels, likelihood
