"""KTO's loss from log-probabilities of answers (`soup.kernels.answers`), for the policy and its reference.

The formula is TRL's, from the trainer's own settings at each call; a loss that is not KTO's is left to TRL.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from trl import KTOTrainer

from soup.kernels import answers
from soup.kernels.answers import READ, counted, mean, summed


def put_on(trainer: Any) -> int | str:
    """1, or why the trainer's loss stays TRL's."""
    if not isinstance(trainer, KTOTrainer):
        return f"{type(trainer).__name__} computes another loss"
    if trainer.loss_type != "kto":
        return f"the loss is {trainer.loss_type}"
    if (why := answers.put_on(trainer)) is not None:
        return why
    trainer._compute_loss = MethodType(_compute_loss, trainer)
    trainer.compute_ref_log_probs = MethodType(_of_reference, trainer)
    return 1


def _compute_loss(self: Any, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
    """In the place of TRL's `KTOTrainer._compute_loss`, with its passes in TRL's order: dropout draws the same."""
    if return_outputs or self.aux_loss_enabled or self.loss_type != "kto":
        return type(self)._compute_loss(self, model, inputs, return_outputs)
    mismatched, rows = _sides(inputs)
    with torch.no_grad():
        far_R = _of_rows(model(**mismatched), mismatched)
    found = model(**rows)
    logp_R = _of_rows(found, rows)
    if "ref_logps" in inputs:
        far_reference_R, reference_R = inputs["ref_KL_logps"], inputs["ref_logps"]
    else:
        reference_R, far_reference_R = _of_reference(self, model, inputs)
    kl = (far_R - far_reference_R).mean().clamp(min=0)
    gain_R = logp_R - reference_R
    good_R = inputs["label"].bool()
    loss_R = torch.where(
        good_R,
        self.desirable_weight * (1 - torch.sigmoid(self.beta * (gain_R - kl))),
        self.undesirable_weight * (1 - torch.sigmoid(self.beta * (kl - gain_R))),
    )
    _note(self, inputs, found, kl, good_R, {"rewards": self.beta * gain_R.detach(), "logps": logp_R.detach()})
    return loss_R.nanmean()


def _of_reference(self: Any, _: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """In the place of TRL's `KTOTrainer.compute_ref_log_probs`: those of answers, and of mismatched ones."""
    mismatched, rows = _sides(inputs)
    far, near = answers.reference(self, mismatched, rows)
    return _of_rows(near, rows), _of_rows(far, mismatched)


def _sides(inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mismatched answers, and the rows' own."""
    return {name: inputs[f"KL_{name}"] for name in READ}, {name: inputs[name] for name in READ}


def _of_rows(found: dict[str, Tensor], rows: dict[str, Tensor]) -> Tensor:
    return summed(found, rows["input_ids"].shape)


def _note(
    trainer: Any,
    inputs: dict[str, Tensor],
    found: dict[str, Tensor],
    kl: Tensor,
    good_R: Tensor,
    values: dict[str, Tensor],
) -> None:
    """TRL's metrics, under its names; of a side that the batch does not have, none."""
    metrics = counted(trainer, inputs)
    metrics["kl"].append(kl.item())
    metrics["entropy"].append(mean(found["entropy_N"]))
    metrics["num_tokens"] = [trainer._total_train_tokens]
    sides = {side: of_R for side, of_R in (("chosen", good_R), ("rejected", ~good_R)) if of_R.any()}
    for side, of_R in sides.items():
        metrics[f"logits/{side}"].append(mean(found["level_N"][of_R[found["row_N"]]]))
    for side, of_R in sides.items():
        for name, value_R in values.items():
            metrics[f"{name}/{side}"].append(mean(value_R[of_R]))
    if len(sides) == 2:
        metrics["rewards/margins"].append(metrics["rewards/chosen"][-1] - metrics["rewards/rejected"][-1])
