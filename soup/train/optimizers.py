"""Optimizers whose groups or state transformers does not make as the configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from soup.model.freeze import stack


def galore(trainer: Any, knobs: Mapping[str, Any]) -> torch.optim.Optimizer:
    """GaLore's AdamW (arXiv:2403.03507): the weights of the linear layers inside the decoder are projected.

    `knobs`: rank, update_proj_gap and scale. transformers would pass on neither betas nor weight decay, and project
    frozen layers and the head as well.
    """
    from galore_torch import GaLoreAdamW

    args, model = trainer.args, trainer.model
    linear = {
        id(module.weight)
        for module in stack(model)[1].modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module.weight.requires_grad
    }
    decaying = set(trainer.get_decay_parameter_names(model))
    projected, plain, exempt = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kept = projected if id(parameter) in linear else plain if name in decaying else exempt
            kept.append(parameter)
    groups = [
        {"params": projected, "weight_decay": args.weight_decay, "proj_type": "std", **knobs},
        {"params": plain, "weight_decay": args.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    optimizer = GaLoreAdamW(
        [group for group in groups if group["params"]],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        no_deprecation_warning=True,
    )
    optimizer.register_state_dict_post_hook(_projectors_to_plain)
    optimizer.register_load_state_dict_pre_hook(_projectors_from_plain)
    return optimizer


class Muon(torch.optim.Optimizer):
    """torch's Muon for matrices of hidden layers, and its AdamW for everything else, as one optimizer."""

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]], **muon: Any):
        self._parts = [(torch.optim.Muon, torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **muon))]
        if others:
            self._parts.append((torch.optim.AdamW, torch.optim.AdamW(others, lr=muon["lr"], fused=True)))
        super().__init__([group for _, part in self._parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        for kind, part in self._parts:
            # Shared anew each time: a checkpoint that is read puts other groups in the place of those of before.
            part.state = self.state
            part.param_groups = [
                group for group in self.param_groups if ("momentum" in group) == (kind is torch.optim.Muon)
            ]
            part.step()
        return loss


def muon(trainer: Any, knobs: Mapping[str, Any]) -> Muon:
    """Muon (Jordan 2024) with the update's size of arXiv:2502.16982, so that one rate fits both of its parts.

    `knobs`: momentum, nesterov and ns_steps. A matrix is an adapter, or a weight of two dimensions inside the decoder
    layers that is no table of embeddings.
    """
    args, model = trainer.args, trainer.model
    tables = {
        id(weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for weight in module.parameters(recurse=False)
    }
    inside = {id(weight) for weight in stack(model)[1].parameters()} - tables
    decaying = set(trainer.get_decay_parameter_names(model))
    groups: dict[tuple[bool, bool], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim == 2 and (id(parameter) in inside or "lora_" in name)
            groups.setdefault((matrix, name in decaying), []).append(parameter)
    made = {
        kind: {"params": parameters, "weight_decay": args.weight_decay if kind[1] else 0.0}
        for kind, parameters in groups.items()
    }
    matrices, others = (
        [made[kind] for kind in sorted(made, reverse=True) if kind[0] is one] for one in (True, False)
    )
    return Muon(matrices, others, lr=args.learning_rate, **knobs)


def _projectors_to_plain(_optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """torch reads no objects of other classes from a checkpoint, unless it is told to trust the file."""
    state = {
        number: held | ({"projector": dict(vars(held["projector"]))} if "projector" in held else {})
        for number, held in state_dict["state"].items()
    }
    return state_dict | {"state": state}


def _projectors_from_plain(_optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    from galore_torch.galore_projector import GaLoreProjector

    state = {}
    for number, held in state_dict["state"].items():
        state[number] = dict(held)
        if "projector" in held:
            state[number]["projector"] = projector = GaLoreProjector(held["projector"]["rank"])
            vars(projector).update(held["projector"])
    return state_dict | {"state": state}
