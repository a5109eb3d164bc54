"""Puts the loss of `soup.kernels.loss` on a model that TRL has given its own loss in chunks."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from soup.kernels import attention, prefixes
from soup.kernels.loss import cross_entropy


@dataclass
class Output(CausalLMOutputWithPast):
    """What TRL's trainer reads of a loss in chunks, beside the loss: sums over the batch's learnt tokens."""

    num_correct_tokens: Tensor | None = None
    entropy_sum: Tensor | None = None
    num_valid_tokens: Tensor | None = None
    aux_loss: Tensor | None = None


def put_on(trainer: Any) -> int | str:
    """1, or why the model's loss stays TRL's."""
    if getattr(trainer.args, "loss_type", None) != "chunked_nll":
        return f"{type(trainer).__name__} computes another loss"
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    if (why := obstacle(model)) is not None:
        return why
    text = model.config.get_text_config()
    theirs = model.forward

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> Any:
        router = others.get("output_router_logits", getattr(text, "output_router_logits", False))
        if labels is None or router or "shift_labels" in others:
            if labels is not None:
                others |= {"labels": labels, "num_items_in_batch": num_items_in_batch}
            return theirs(input_ids=input_ids, **others)
        others.pop("use_cache", None)
        others.pop("output_router_logits", None)
        mask_BT = others.get("attention_mask")
        if mask_BT is not None and self.config._attn_implementation == attention.NAME:
            del others["attention_mask"]
            input_ids, labels, others["position_ids"] = _without_padding(input_ids, labels, mask_BT)
        place_BT = torch.arange(labels.numel(), device=labels.device).view_as(labels)
        positions = others.get("position_ids")
        if positions is not None and len(labels) == 1 and others.get("attention_mask") is None:
            input_ids, others["position_ids"], place_BT = prefixes.merged(self, input_ids, positions)
        hidden = self.base_model(input_ids=input_ids, use_cache=False, **others).last_hidden_state
        loss, correct, entropy, learnt = cross_entropy(
            hidden.flatten(0, 1),
            self.get_output_embeddings().weight,
            place_BT[:, :-1].flatten(),
            labels[:, 1:].flatten(),
            num_items_in_batch,
        )
        return Output(loss=loss, num_correct_tokens=correct, entropy_sum=entropy, num_valid_tokens=learnt)

    forward.__signature__ = inspect.signature(theirs)
    model.forward = MethodType(forward, model)
    return 1


def _without_padding(ids_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, labels and positions, (1, tokens), of rows one after another; evaluation has them padded."""
    kept_BT = mask_BT.bool()
    positions_1N = (mask_BT.cumsum(1) - 1)[kept_BT][None]
    return ids_BT[kept_BT][None], labels_BT[kept_BT][None].masked_fill(positions_1N == 0, -100), positions_1N


def obstacle(model: Any) -> str | None:
    """Why a model's logits are not hidden states times the head's matrix."""
    text = model.config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "output_multiplier"):
        if getattr(text, name, None) is not None:
            return f"{text.model_type} changes its logits ({name})"
    if getattr(text, "output_router_logits", False):
        return "the model adds its router's balancing loss itself"
    output = model.get_output_embeddings()
    if type(output) is not nn.Linear or output.bias is not None:
        return f"the head is {type(output).__name__}" + (" with a bias" if type(output) is nn.Linear else "")
    return None
