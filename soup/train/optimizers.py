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
