"""Bottom layers that do not train (`training.freeze_layers`, `training.freeze_ratio`)."""

from __future__ import annotations

import re
from typing import Any

from torch.nn import ModuleList

from soup.errors import Problem, Refused
from soup.specs import TrainingSpec


def stack(model: Any) -> tuple[str, ModuleList]:
    """The decoder layers in the order in which tokens pass them, with the name of their list in the model.

    Raises:
        Refused: the model has no such list.
    """
    config = model.config.get_text_config()
    for name, module in model.named_modules():
        if isinstance(module, ModuleList) and len(module) == config.num_hidden_layers:
            return name, module
    raise Refused(
        Problem(
            key="training.freeze_layers",
            why=f"{type(model).__name__} has no list of {config.num_hidden_layers} layers to freeze",
            fix="training.freeze_layers=0 training.freeze_ratio=0.0",
        )
    )


def freeze(model: Any, training: TrainingSpec) -> str | None:
    """Takes the bottom layers out of training; embeddings, upper layers, last norm and head go on.

    Returns a regular expression for the modules that get no adapters either, `None` where nothing is frozen.
    """
    if not training.freeze_layers and not training.freeze_ratio:
        return None
    name, layers = stack(model)
    count = training.frozen(len(layers))
    for layer in layers[:count]:
        layer.requires_grad_(False)
    return rf"(.*\.)?{re.escape(name)}\.({'|'.join(map(str, range(count)))})\..*"
