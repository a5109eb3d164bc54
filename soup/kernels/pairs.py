"""DPO's and IPO's loss from log-probabilities of answers (`soup.kernels.answers`), for the policy and its reference.

The formulas are TRL's, from the trainer's own settings at each call; a loss that is not one of them is left to TRL.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import DPOTrainer

from soup.kernels import answers
from soup.kernels.answers import READ, counted, mean, summed

LOSSES = {"sigmoid", "robust", "ipo"}


def put_on(trainer: Any) -> int | str:
    """1, or why the trainer's loss stays TRL's."""
    if not isinstance(trainer, DPOTrainer):
        return f"{type(trainer).__name__} computes another loss"
    if not _known(trainer):
        return f"the loss is {', '.join(trainer.loss_types)}"
    if (why := answers.put_on(trainer)) is not None:
        return why
    trainer._compute_loss = MethodType(_compute_loss, trainer)
    trainer.compute_ref_log_probs = MethodType(_of_reference, trainer)
    return 1


def _known(trainer: Any) -> bool:
    plain = trainer.f_divergence_type == "reverse_kl" and trainer.ld_alpha is None
    return set(trainer.loss_types) <= LOSSES and plain and not trainer.use_weighting


def _compute_loss(self: Any, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
    """In the place of TRL's `DPOTrainer._compute_loss`."""
    if return_outputs or self.aux_loss_enabled or not _known(self):
        return type(self)._compute_loss(self, model, inputs, return_outputs)
    asked = {name: inputs[name] for name in READ}
    shape = inputs["input_ids"].shape
    found = model(**asked)
    logp_R = summed(found, shape)
    if "ref_chosen_logps" in inputs:
        reference_R = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
    else:
        reference_R = torch.cat(_of_reference(self, model, inputs))
    ratio_R = logp_R - reference_R
    gap = _gap(ratio_R)
    loss = torch.zeros((), device=gap.device)
    for kind, weight in zip(self.loss_types, self.loss_weights, strict=True):
        if kind == "ipo":  # means of each answer's tokens
            mean_R = ratio_R / inputs["completion_mask"].sum(1).clamp(min=1)
            losses = (_gap(mean_R) - 1 / (2 * self.beta)) ** 2
        elif kind == "robust":
            wrong = self.label_smoothing
            losses = wrong * logsigmoid(-self.beta * gap) - (1 - wrong) * logsigmoid(self.beta * gap)
            losses = losses / (1 - 2 * wrong)
        else:
            losses = -logsigmoid(self.beta * gap)
        loss = loss + losses.mean() * weight
    _note(self, inputs, found, logp_R.detach(), self.beta * ratio_R.detach())
    return loss


def _of_reference(self: Any, _: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """In the place of TRL's `DPOTrainer.compute_ref_log_probs`: chosen and rejected answers' log-probabilities."""
    (found,) = answers.reference(self, {name: inputs[name] for name in READ})
    chosen, rejected = summed(found, inputs["input_ids"].shape).chunk(2)
    return chosen, rejected


def _gap(value_R: Tensor) -> Tensor:
    """Chosen minus rejected, of each pair."""
    chosen, rejected = value_R.chunk(2)
    return chosen - rejected


def _note(
    trainer: Any, inputs: dict[str, Tensor], found: dict[str, Tensor], logp_R: Tensor, reward_R: Tensor
) -> None:
    """TRL's metrics, under its names; all of them are of tokens of answers."""
    metrics = counted(trainer, inputs)
    chosen_N = found["row_N"] < len(logp_R) // 2
    metrics["entropy"].append(mean(found["entropy_N"]))
    metrics["num_tokens"] = [trainer._total_train_tokens]
    metrics["logits/chosen"].append(mean(found["level_N"][chosen_N]))
    metrics["logits/rejected"].append(mean(found["level_N"][~chosen_N]))
    metrics["mean_token_accuracy"].append(mean(found["right_N"][chosen_N]))
    margin = _gap(reward_R)
    for side, rewards in zip(("chosen", "rejected"), reward_R.chunk(2), strict=True):
        metrics[f"rewards/{side}"].append(mean(rewards))
    metrics["rewards/accuracies"].append(mean((margin > 0).float()))
    metrics["rewards/margins"].append(mean(margin))
    for side, logps in zip(("chosen", "rejected"), logp_R.chunk(2), strict=True):
        metrics[f"logps/{side}"].append(mean(logps))
