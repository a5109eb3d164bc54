"""Mixtures of experts: which parameters are experts, what routes to them, and where adapters go.

transformers 5 holds the experts of a layer in two parameters of three dimensions, experts first. PEFT adapts those
through `target_parameters`. It also reads the names that their matrices had before (gate_proj, up_proj, down_proj;
w1, w2, w3) as the fused parameters', `all-linear` included (peft.utils.transformers_weight_conversion), so that it
would adapt experts that nobody asked for, the router as well, and never a dense layer or shared expert of such a name.
So adapters get the names of the other linear layers, and experts their own by `training.moe_lora`.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from torch import nn

from soup.errors import Problem, Refused
from soup.model.freeze import stack
from soup.rules.moe import COUNTS, EXPERT_NAMES
from soup.specs import TrainingSpec

ROUTERS = ("gate", "router")


def count(model: Any) -> int:
    """Routed experts of each MoE layer, 0 of a dense model."""
    config = model.config.get_text_config()
    experts = max(getattr(config, name, None) or 0 for name in COUNTS)
    return experts if experts > 1 else 0


def fused(model: Any) -> dict[str, nn.Parameter]:
    """The parameters that hold all experts of a layer, by their names in the model."""
    experts = count(model)
    return {
        f"{name}.{leaf}": parameter
        for name, module in model.named_modules()
        if experts and not isinstance(module, nn.modules.conv._ConvNd)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and parameter.shape[0] == experts
    }


def routers(model: Any) -> dict[str, nn.Module]:
    """The modules that send tokens to experts: one row of weights for each expert."""
    experts = count(model)
    return {
        name: module
        for name, module in model.named_modules()
        if experts
        and not set(ROUTERS).isdisjoint(name.split("."))
        and (weight := getattr(module, "weight", None)) is not None
        and weight.dim() == 2
        and weight.shape[0] == experts
    }


def place(adapters: LoraConfig | None, model: Any, training: TrainingSpec) -> LoraConfig | None:
    """Adapters for an MoE model: on attention's linear layers, and with `training.moe_lora` on experts above the frozen
    layers. A dense model's stay as they are.

    Raises:
        Refused: this model's experts are not in parameters that PEFT can adapt, or all lie in frozen layers.
    """
    if adapters is None or not count(model):
        return adapters
    if adapters.target_modules == "all-linear":
        adapters.target_modules = linear(model)
    if training.moe_lora:
        wanted, still = sorted(fused(model)), ()
        if training.freeze_layers or training.freeze_ratio:
            name, layers = stack(model)
            still = tuple(f"{name}.{number}." for number in range(training.frozen(len(layers))))
            wanted = [key for key in wanted if not key.startswith(still)]
        if not wanted:
            kind = model.config.get_text_config().model_type
            raise Refused(
                Problem(
                    key="training.moe_lora",
                    value="true",
                    why=f"no layer that trains holds experts of {kind} in one parameter, as PEFT adapts them",
                    fix="training.moe_lora=false, or fewer frozen layers",
                )
            )
        adapters.target_parameters = (
            wanted if still else sorted({".".join(k.split(".")[-3:]) for k in wanted})
        )
    return adapters


def linear(model: Any) -> list[str]:
    """Last names of the linear layers that `all-linear` means: no head, no router, none that PEFT takes for experts."""
    routing = set(routers(model))
    heads = {"lm_head", "score"}
    return sorted(
        {
            leaf
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and name not in routing
            and (leaf := name.rpartition(".")[2]) not in EXPERT_NAMES | heads
        }
    )
