"""Adapters as they sit on the modules, and what trains."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from soup.effects import Effect, same
from soup.effects.adapted import outputs
from soup.effects.optimizer import optimizer
from soup.model.experts import count, routers
from soup.rules.moe import EXPERT_NAMES


def adapter(built: Any) -> Iterator[Effect]:
    """Rank, scale, dropout, variant and placement of LoRA, from shapes and attributes of the layers."""
    import torch

    spec = built.config.lora
    layers = {name: m for name, m in built.model.named_modules() if hasattr(m, "lora_A") and m.lora_A}
    first = next(iter(built.model.peft_config)) if hasattr(built.model, "peft_config") else "default"
    # The experts of a fused parameter have their A side by side.
    ranks = sorted({m.lora_A[first].weight.shape[0] // getattr(m, "num_experts", 1) for m in layers.values()})
    how = f"shapes of A on {len(layers)} modules"
    yield same("lora.r", spec.r, ranks[0] if len(ranks) == 1 else ranks, how)
    root = math.sqrt(spec.r) if spec.use_rslora else spec.r
    scales = sorted({float(layer.scaling[first]) for layer in layers.values()})
    alphas = [round(scale * root, 6) for scale in scales]
    how = f"the modules scale B A by {scales}"
    yield same("lora.alpha", float(spec.alpha), alphas[0] if len(alphas) == 1 else alphas, how)
    rooted = bool(scales) and all(math.isclose(s, spec.alpha / math.sqrt(spec.r)) for s in scales)
    yield Effect("lora.use_rslora", spec.use_rslora, rooted, rooted == spec.use_rslora or spec.r == 1, how)
    drops = sorted({getattr(layer.lora_dropout[first], "p", 0.0) for layer in layers.values()})
    yield same("lora.dropout", float(spec.dropout), drops[0] if len(drops) == 1 else drops, "dropout modules")
    magnitudes = sum(len(getattr(layer, "lora_magnitude_vector", ())) > 0 for layer in layers.values())
    how = f"{magnitudes} of {len(layers)} modules have a magnitude vector"
    dora = magnitudes > 0 if magnitudes in (0, len(layers)) else "on some modules"
    yield same("lora.use_dora", spec.use_dora, dora, how)
    yield from outputs(built, layers, first)
    ratio, how = _rate_ratio(built)
    wanted = spec.loraplus_lr_ratio
    right = math.isclose(ratio, wanted or 1.0)
    yield Effect("lora.loraplus_lr_ratio", wanted, wanted if right else ratio, right, how)
    heads, frozen = _heads(built), _frozen_modules(built)
    layers = {
        name: m for name, m in layers.items() if not hasattr(m, "parameter_name")
    }  # moe:experts has those
    moe, routing = bool(count(built.model)), routers(built.model)
    if spec.target_modules == "all-linear":
        linear = [
            name
            for name, m in built.model.named_modules()
            if (isinstance(m, torch.nn.Linear) or hasattr(m, "base_layer"))
            and "lora_" not in name
            and not name.endswith(".base_layer")
            and m not in heads
            and name not in frozen
            and not hasattr(m, "parameter_name")
            and not (moe and (name in routing or name.rpartition(".")[2] in EXPERT_NAMES))
        ]
        missing, stray = sorted(set(linear) - set(layers)), sorted(set(layers) - set(linear))
        ok = bool(layers) and not missing and not stray
        effective: Any = "all-linear" if ok else f"all but {missing[:3]}, and {stray[:3]}"
    else:
        wanted = (spec.target_modules,) if isinstance(spec.target_modules, str) else spec.target_modules
        above = [name for name in _modules(built.model) if name not in frozen]
        named = {w: [n for n in above if n == w or n.endswith(f".{w}")] for w in wanted}
        effective = sorted({name.rpartition(".")[2] for name in layers})
        ok = all(named.values()) and set().union(*named.values()) == set(layers)
    yield Effect(
        "lora.target_modules",
        built.config.tree["lora"]["target_modules"],
        effective,
        ok,
        f"{len(layers)} modules: {_kinds(layers)}",
    )


def trainable(built: Any) -> Iterator[Effect]:
    """Parameters that train: all of them without adapters, those of the adapters alone with them."""
    optimizer(built)  # whatever making it does to the model has been done
    trains = {name: p.numel() for name, p in built.model.named_parameters() if p.requires_grad}
    total = sum(p.numel() for p in built.model.parameters())
    if built.config.lora.r is None:
        still = _frozen_modules(built)
        frozen = sum(
            p.numel() for name, p in built.model.named_parameters() if name.rpartition(".")[0] in still
        )
        if sum(trains.values()) != total - frozen:
            how = f"{sum(trains.values()):,} of {total - frozen:,} parameters train"
            asked = built.config.training.freeze_layers
            yield Effect("training.freeze_layers", asked, "other weights are frozen", False, how)
        return
    scores = _heads(built) if built.config.task.head == "score" else []
    also = {id(p) for head in scores for p in head.parameters()}
    foreign = [
        name
        for name, p in built.model.named_parameters()
        if p.requires_grad and "lora_" not in name and id(p) not in also
    ]
    still = [name for name, p in built.model.named_parameters() if "lora_" in name and not p.requires_grad]
    if foreign or still or not trains:
        how = (
            f"{len(trains)} tensors train; outside the adapters {foreign[:3]}, in them and frozen {still[:3]}"
        )
        asked = built.config.tree["lora"]["target_modules"]
        yield Effect("lora.target_modules", asked, foreign[:3] or still[:3], False, how)


def _heads(built: Any) -> list[Any]:
    """What the model ends in, which `all-linear` passes by; a reward model's trains whole."""
    if built.config.task.head == "score":
        return [m for name, m in built.model.named_modules() if ".score" in f".{name}"]
    return [built.model.get_output_embeddings()]


def _rate_ratio(built: Any) -> tuple[float, str]:
    """The rate of B over that of A in the optimizer's groups; not a number where one has several."""
    rates: dict[str, set[float]] = {"lora_A": set(), "lora_B": set()}
    names = {id(p): name for name, p in built.model.named_parameters()}
    for group in optimizer(built).param_groups:
        for parameter in group["params"]:
            for kind, found in rates.items():
                if kind in names.get(id(parameter), ""):
                    found.add(group["initial_lr"])
    how = f"rates of A {sorted(rates['lora_A'])} and of B {sorted(rates['lora_B'])} in the optimizer's groups"
    if any(len(found) != 1 for found in rates.values()):
        return math.nan, how
    return rates["lora_B"].pop() / rates["lora_A"].pop(), how


def _frozen_modules(built: Any) -> set[str]:
    """Names of the modules in the layers that are to be frozen."""
    if not (built.config.training.freeze_layers or built.config.training.freeze_ratio):
        return set()
    from soup.model.freeze import stack

    name, layers = stack(built.model)
    return {
        f"{name}.{number}.{inner}"
        for number, layer in enumerate(layers[: built.config.training.frozen(len(layers))])
        for inner, _ in layer.named_modules()
    }


def _modules(model: Any) -> list[str]:
    """Names of the model's own modules, without what adapters added to them."""
    names = (name for name, _ in model.named_modules())
    return [name for name in names if "lora_" not in name and not name.endswith(".base_layer")]


def _kinds(layers: Any) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
