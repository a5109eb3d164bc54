"""A second forward pass of a causal model, for losses of log-probabilities: only tokens that are asked for reach the
head, no logits are kept, and rows lie one after another without padding where `soup.kernels.attention` keeps them
apart.
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32, is_peft_model
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from soup.kernels import attention, head, prefixes
from soup.kernels.logps import log_probabilities

READ = ("input_ids", "attention_mask", "completion_mask")  # what a batch of answers is to the pass


def put_on(trainer: Any) -> str | None:
    """Gives the pass to the policy and to a frozen copy; or why logits are needed, and nothing is changed."""
    if trainer.aux_loss_enabled:
        return "the router's balancing loss is part of it"
    models = causal_models(trainer)
    for model in models:
        if (why := head.obstacle(model) or _scaled(model)) is not None:
            return why
    for model in models:
        _answer(model, trainer.accelerator)
    return None


def causal_models(trainer: Any) -> list[Any]:
    """The policy, and a frozen copy where the trainer holds one; without their adapters."""
    both = (trainer.model, getattr(trainer, "ref_model", None))
    return [
        one.get_base_model() if hasattr(one, "get_base_model") else one for one in both if one is not None
    ]


def _scaled(model: Any) -> str | None:
    """Why logits are not the head's product alone: tried, on a few tokens."""
    from soup.effects import as_it_was

    weight_VD = model.get_output_embeddings().weight
    device, dtype = weight_VD.device, weight_VD.dtype
    ids_1T = torch.arange(2, 7, device=device)[None]
    mixed = torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)  # norms may be in float32
    with as_it_was(model), torch.no_grad(), mixed:
        model.eval()
        bare = model._original_forward if hasattr(model, "_original_forward") else model.forward
        logits = bare(input_ids=ids_1T, use_cache=False).logits.float()
        hidden = model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state
        ours = hidden.float() @ weight_VD.float().T
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
    model: Any,
    *,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    temperature: float = 1.0,
    **others: Any,
) -> dict[str, Tensor]:
    others |= {"use_cache": False}
    places_BT = attention_mask.cumsum(1) - 1
    if model.config._attn_implementation == attention.NAME:
        kept_BT = attention_mask.bool()
        ids_1N, places_1N = input_ids[kept_BT][None], places_BT[kept_BT][None]
        ids_1K, positions_1K, place_1N = prefixes.merged(model, ids_1N, places_1N)
        hidden = model.base_model(input_ids=ids_1K, position_ids=positions_1K, **others).last_hidden_state
        place_N = place_1N[0]
    else:
        kept_BT = torch.ones_like(attention_mask, dtype=torch.bool)
        hidden = model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, **others
        ).last_hidden_state
        place_N = torch.arange(input_ids.numel(), device=input_ids.device)
    row_N, column_N = kept_BT.nonzero().unbind(1)
    learnt = (completion_mask[kept_BT].bool() & (places_BT[kept_BT] > 0)).nonzero()[:, 0]
    before_ND = hidden.flatten(0, 1).index_select(0, place_N[learnt - 1])
    if temperature != 1.0:
        before_ND = before_ND / temperature
    weight_VD = model.get_output_embeddings().weight
    found = log_probabilities(before_ND, weight_VD, input_ids[kept_BT][learnt])
    return found._asdict() | {"row_N": row_N[learnt], "column_N": column_N[learnt]}


def summed(found: dict[str, Tensor], shape: torch.Size) -> Tensor:
    """Log-probabilities of each row of a batch of that shape, added up in the order in which TRL does."""
    return placed(found, shape).sum(1)


def placed(found: dict[str, Tensor], shape: torch.Size, name: str = "logp_N") -> Tensor:
    """The log-probability of each token where it is in a batch of that shape, and 0 elsewhere."""
    value_N = found[name]
    return value_N.new_zeros(shape).index_put((found["row_N"], found["column_N"]), value_N)


def reference(trainer: Any, *batches: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """What the frozen copy, or the policy with its adapters off, or before it trains, says of each batch."""
    model, frozen = trainer.model, trainer.ref_model
    with (
        torch.no_grad(),
        disable_gradient_checkpointing(model, trainer.args.gradient_checkpointing_kwargs),
    ):
        if frozen is not None or not is_peft_model(model):
            return [(model if frozen is None else frozen)(**asked) for asked in batches]
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return [model(**asked) for asked in batches]


def counted(trainer: Any, inputs: dict[str, Tensor]) -> Any:
    """The metrics of TRL's trainer, of training or evaluation; in training the batch's tokens count."""
    if trainer.model.training:
        trainer._total_train_tokens += int(inputs["attention_mask"].sum())
    return trainer._metrics["train" if trainer.model.training else "eval"]


def mean(values: Tensor) -> float:
    """0 of nothing, as TRL's metrics have it."""
    return values.mean().item() if len(values) else 0.0
