"""DPO's and IPO's loss on rows without padding and without logits, for the policy and for its reference.

TRL's trainer pads both answers of all pairs to the longest and turns every token into logits. Here rows lie one after
another (where `soup.kernels.attention` keeps them apart), and only tokens of answers reach the head. The formulas are
TRL's, from the trainer's own settings at each call; a loss that is not one of them is left to TRL.
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from soup.kernels import attention, head
from soup.kernels.logps import log_probabilities

LOSSES = {"sigmoid", "robust", "ipo"}


def put_on(trainer: Any) -> int | str:
    """1, or why the trainer's loss stays TRL's."""
    if not isinstance(trainer, DPOTrainer):
        return f"{type(trainer).__name__} computes another loss"
    if trainer.aux_loss_enabled:
        return "the router's balancing loss is part of it"
    if not _known(trainer):
        return f"the loss is {', '.join(trainer.loss_types)}"
    models = causal_models(trainer)
    for model in models:
        if (why := head.obstacle(model) or _scaled(model)) is not None:
            return why
    for model in models:
        _answer(model, trainer.accelerator)
    trainer._compute_loss = MethodType(_compute_loss, trainer)
    return 1


def causal_models(trainer: Any) -> list[Any]:
    """The policy, and a frozen copy where the trainer holds one; without their adapters."""
    both = (trainer.model, getattr(trainer, "ref_model", None))
    return [
        one.get_base_model() if hasattr(one, "get_base_model") else one for one in both if one is not None
    ]


def _known(trainer: Any) -> bool:
    plain = trainer.f_divergence_type == "reverse_kl" and trainer.ld_alpha is None
    return set(trainer.loss_types) <= LOSSES and plain and not trainer.use_weighting


def _scaled(model: Any) -> str | None:
    """Why logits are not the head's product alone: tried, on a few tokens."""
    from soup.effects import as_it_was

    device = next(model.parameters()).device
    ids_1T = torch.arange(2, 7, device=device)[None]
    with as_it_was(model), torch.no_grad(), torch.autocast(device.type, enabled=False):
        model.eval()
        bare = model._original_forward if hasattr(model, "_original_forward") else model.forward
        logits = bare(input_ids=ids_1T, use_cache=False).logits.float()
        hidden = model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state
        ours = hidden.float() @ model.get_output_embeddings().weight.float().T
    if (ours - logits).abs().mean() > 0.03 * logits.abs().mean():
        return f"{type(model).__name__} changes its logits"
    return None


def _answer(model: Any, accelerator: Any) -> None:
    """Gives a model a second forward pass, for those who name the tokens of answers: what `Tokens` has of each of
    them, and where in the batch it is."""
    prepared = hasattr(model, "_original_forward")  # by accelerate, as it has the frozen copy
    theirs = model._original_forward if prepared else model.forward

    def forward(self: Any, *given: Any, completion_mask: Tensor | None = None, **named: Any) -> Any:
        if completion_mask is None:
            return theirs(*given, **named)
        return _tokens(self, completion_mask=completion_mask, **named)

    forward.__signature__ = inspect.signature(theirs)
    model.forward = ours = MethodType(forward, model)
    if prepared:

        def within(*given: Any, **named: Any) -> Any:
            with accelerator.autocast():
                return ours(*given, **named)

        model._original_forward, model.forward = ours, convert_outputs_to_fp32(within)


def _tokens(
    model: Any, *, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, **others: Any
) -> dict[str, Tensor]:
    others |= {"use_cache": False}
    if model.config._attn_implementation == attention.NAME:
        kept_BT = attention_mask.bool()  # padding is on the right: columns are positions
        ids_1N, places_1N = input_ids[kept_BT][None], kept_BT.nonzero()[None, :, 1]
        hidden = model.base_model(input_ids=ids_1N, position_ids=places_1N, **others).last_hidden_state
    else:
        kept_BT = torch.ones_like(attention_mask, dtype=torch.bool)
        hidden = model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, **others
        ).last_hidden_state
    row_N, column_N = kept_BT.nonzero().unbind(1)
    learnt = (completion_mask[kept_BT].bool() & (column_N > 0)).nonzero()[:, 0]
    before_ND = hidden.reshape(-1, hidden.shape[-1]).index_select(0, learnt - 1)
    weight_VD = model.get_output_embeddings().weight
    found = log_probabilities(before_ND, weight_VD, input_ids[kept_BT][learnt])
    return found._asdict() | {"row_N": row_N[learnt], "column_N": column_N[learnt]}


def _summed(values_N: Tensor, found: dict[str, Tensor], shape: torch.Size) -> Tensor:
    """Of each row of a batch of that shape, added up in the order in which TRL does."""
    padded_BT = values_N.new_zeros(shape).index_put((found["row_N"], found["column_N"]), values_N)
    return padded_BT.sum(1)


def _reference(trainer: Any, asked: dict[str, Tensor]) -> dict[str, Tensor]:
    model, frozen = trainer.model, trainer.ref_model
    with (
        torch.no_grad(),
        disable_gradient_checkpointing(model, trainer.args.gradient_checkpointing_kwargs),
    ):
        if frozen is not None:
            return frozen(**asked)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return model(**asked)


def _compute_loss(self: Any, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
    """In the place of TRL's `DPOTrainer._compute_loss`."""
    if return_outputs or self.aux_loss_enabled or not _known(self):
        return type(self)._compute_loss(self, model, inputs, return_outputs)
    asked = {name: inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")}
    shape = inputs["input_ids"].shape
    found = model(**asked)
    logp_R = _summed(found["logp_N"], found, shape)
    if "ref_chosen_logps" in inputs:
        reference_R = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
    else:
        frozen = _reference(self, asked)
        reference_R = _summed(frozen["logp_N"], frozen, shape)
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


def _gap(value_R: Tensor) -> Tensor:
    """Chosen minus rejected, of each pair."""
    chosen, rejected = value_R.chunk(2)
    return chosen - rejected


def _note(
    trainer: Any, inputs: dict[str, Tensor], found: dict[str, Tensor], logp_R: Tensor, reward_R: Tensor
) -> None:
    """TRL's metrics, under its names; all of them are of tokens of answers."""
    training = trainer.model.training
    metrics = trainer._metrics["train" if training else "eval"]
    chosen_N = found["row_N"] < len(logp_R) // 2
    if training:
        trainer._total_train_tokens += int(inputs["attention_mask"].sum())
    metrics["entropy"].append(_mean(found["entropy_N"]))
    metrics["num_tokens"] = [trainer._total_train_tokens]
    metrics["logits/chosen"].append(_mean(found["level_N"][chosen_N]))
    metrics["logits/rejected"].append(_mean(found["level_N"][~chosen_N]))
    metrics["mean_token_accuracy"].append(_mean(found["right_N"][chosen_N]))
    margin = _gap(reward_R)
    for side, rewards in zip(("chosen", "rejected"), reward_R.chunk(2), strict=True):
        metrics[f"rewards/{side}"].append(_mean(rewards))
    metrics["rewards/accuracies"].append(_mean((margin > 0).float()))
    metrics["rewards/margins"].append(_mean(margin))
    for side, logps in zip(("chosen", "rejected"), logp_R.chunk(2), strict=True):
        metrics[f"logps/{side}"].append(_mean(logps))


def _mean(values: Tensor) -> float:
    return values.mean().item() if len(values) else 0.0
