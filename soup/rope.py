"""How far rotary embeddings are stretched (`longctx=`), from the configuration and the model's config.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soup.errors import Problem, Refused
from soup.schema import Config

KEY = "longctx.rope_scaling_type"
LAYERED = "full_attention"  # of layers that differ, those that look back without bound: the ones to scale
# Architectures whose scaling tests/model/test_rope.py proves on a real small model. Others are refused: transformers
# has a rotary embedding of its own for each, and some of them read no scaling.
# fmt: off
ROTARY = (
    "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_neox",
    "granite", "helium", "llama", "ministral", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "persimmon",
    "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
)
# fmt: on
BY_LAYER = ("gemma3_text", "olmo3")
AGAIN = {  # kinds that say in config.json what they started from, with the parameters that a new factor leaves right
    "yarn": {"beta_fast", "beta_slow"},
    "llama3": {"low_freq_factor", "high_freq_factor"},
}
COMMON = {
    "rope_type",
    "type",
    "factor",
    "rope_theta",
    "original_max_position_embeddings",
    "partial_rotary_factor",
}
BASE_CONFIG = "base_config.json"  # beside an adapter: what of its base's config.json it was trained with


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Rotary scaling that is asked for. Lengths are in tokens.

    `own`: the length that the model was pretrained for. `length`: the one that it is to reach. `positions`: what
    max_position_embeddings must say, which for dynamic scaling is what its formula starts from.
    """

    kind: str
    factor: float
    own: int
    length: int
    reason: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def positions(self) -> int:
        return self.own if self.kind == "dynamic" else self.length


def scaling(config: Config, model: Mapping[str, Any]) -> Scaling | None:
    """What `longctx` comes to for the model with this config.json; `None` where nothing is scaled.

    Raises:
        Refused: this model cannot be scaled so, or not so far.
    """
    asked = config.longctx
    kind = asked.rope_scaling_type
    if kind == "none":
        return None
    own = _own_length(kind, model)
    needed = config.data.max_length + config.task.generates
    factor = asked.rope_factor
    words = f"data.max_length={config.data.max_length}"
    if config.task.generates:
        words += f" and {config.task.generates} generated tokens"
    if factor is None:
        reaches = max(context(model) or own, own)
        if needed <= reaches:
            raise Refused(
                Problem(
                    key="longctx.rope_factor",
                    value="null",
                    why=f"{words} fits in the {reaches} tokens that the model reaches already, so no factor follows",
                    fix="a larger data.max_length, longctx.rope_factor=2.0 for example, or longctx=none",
                )
            )
        factor, length = needed / own, needed
        reason = f"{factor:g} = {needed} ({words}) over the model's own {own}"
    else:
        length = math.floor(factor * own + 1e-6)
        reason = f"longctx.rope_factor={factor:g} times the model's own {own}"
        if needed > length:
            raise Refused(
                Problem(
                    key="data.max_length",
                    value=config.data.max_length,
                    why=(f"with {config.task.generates} generated tokens " if config.task.generates else "")
                    + f"is beyond the {length} tokens that longctx.rope_factor={factor:g} makes of the model's {own}",
                    fix=f"data.max_length={max(1, length - config.task.generates)}, or a larger longctx.rope_factor",
                )
            )
    parameters = dict(asked.parameters)
    _ordered(kind, parameters)
    if kind == "dynamic" and frequencies(model) < 2:
        why = (
            "this model rotates two numbers of a head, at one frequency, and the formula spreads over several"
        )
        raise Refused(Problem(key=KEY, value=kind, why=why, fix="longctx=linear"))
    if kind == "longrope":
        _searched(parameters, frequencies(model))
    if kind in ("yarn", "llama3", "longrope"):
        parameters["original_max_position_embeddings"] = own
    return Scaling(kind=kind, factor=factor, own=own, length=length, reason=reason, parameters=parameters)


def context(model: Mapping[str, Any]) -> int | None:
    """Tokens that a model's config.json says it reaches, `None` if it says nothing."""
    model = model.get("text_config") or model
    positions = model.get("max_position_embeddings")
    now = current(model)
    if (
        positions is not None and _kind(now) == "dynamic"
    ):  # transformers' formula starts from the unscaled length
        return math.floor(positions * float(now.get("factor") or 1.0) + 1e-6)
    return positions


def current(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary parameters in a config.json, of the layers that look back without bound where layers differ."""
    found = model.get("rope_parameters") or model.get("rope_scaling") or {}
    if isinstance(found.get(LAYERED), Mapping):
        found = found[LAYERED]
    return found


def frequencies(model: Mapping[str, Any]) -> int:
    """Frequencies of a head, from config.json."""
    width = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
    share = current(model).get("partial_rotary_factor") or model.get("partial_rotary_factor")
    default = {"gpt_neox": model.get("rotary_pct", 0.25), "phi": 0.5, "persimmon": 0.5, "stablelm": 0.25}
    default |= {"glm": 0.5, "glm4": 0.5, "nemotron": 0.5}
    return int(width * (share or default.get(model.get("model_type", ""), 1.0))) // 2


def scorers_fit(config: Config) -> None:
    """Refuses PPO on answers that its reward or value model cannot read whole: those keep the context that they have.

    A folder that is not there, or is no model's, is refused where it is loaded.
    """
    needed = config.data.max_length + config.task.generates
    for key in ("reward_model", "value_model"):
        folder = config.tree["task"].get(key)
        reach = context(_described(Path(folder).expanduser())) if folder is not None else None
        if reach is not None and needed > reach:
            raise Refused(
                Problem(
                    key=f"task.{key}",
                    value=folder,
                    why=f"reaches {reach} tokens, and a prompt with its answer may have {needed}",
                    fix="a smaller data.max_length, or one that task=reward has trained with longctx",
                )
            )


def changed(folder: Path) -> dict[str, Any]:
    """What an adapter's base must be loaded with, that its own config.json does not say; empty where nothing."""
    path = folder / BASE_CONFIG
    return json.loads(path.read_text()) if path.is_file() else {}


def _described(folder: Path) -> Mapping[str, Any]:
    try:
        adapter = folder / "adapter_config.json"
        base = folder
        if adapter.is_file():
            base = Path(json.loads(adapter.read_text())["base_model_name_or_path"])
        return json.loads((base / "config.json").read_text()) | changed(folder)
    except (OSError, ValueError, KeyError):
        return {}


def _own_length(kind: str, model: Mapping[str, Any]) -> int:
    """The length that a model was pretrained for; refuses one that cannot be scaled by this kind."""
    name = model.get("model_type")
    if name not in ROTARY:
        if model.get("text_config") is not None:
            why = f"is asked of a {name} model, of text and more, which soup does not scale"
        elif any(model.get(key) for key in ("rope_theta", "rope_parameters", "rope_scaling")):
            why = f"is asked of a {name} model, on which soup has not proved it"
        else:
            why = f"is asked of a {name} model, whose config.json describes no rotary embedding to scale"
        raise Refused(
            Problem(key=KEY, value=kind, why=why, fix=f"longctx=none, or one of: {', '.join(ROTARY)}")
        )
    if name == "phi3" and kind != "longrope":
        why = "transformers takes no scaling but longrope for a phi3 model"
        raise Refused(Problem(key=KEY, value=kind, why=why, fix="longctx=longrope, or longctx=none"))
    if name in BY_LAYER and kind == "longrope":
        # transformers 5.17, longrope_frequency_update: `long_inv_freq` is unbound from the second long batch on
        why = f"transformers fails at the second long batch of a {name} model, whose layers differ"
        raise Refused(Problem(key=KEY, value=kind, why=why, fix="longctx=yarn"))
    positions, now = model.get("max_position_embeddings"), current(model)
    if not isinstance(positions, int):
        why = "the model's config.json has no max_position_embeddings, the length to start from"
        raise Refused(Problem(key=KEY, value=kind, why=why, fix="longctx=none, or a complete config.json"))
    if _kind(now) == "default":
        return positions
    own = now.get("original_max_position_embeddings") or model.get("original_max_position_embeddings")
    if _kind(now) == kind and kind in AGAIN and isinstance(own, int) and set(now) <= COMMON | AGAIN[kind]:
        return own
    why = f"the model's config.json scales by {_kind(now)} already (factor {now.get('factor', 'unknown')}), and what is"
    why += " scaled would be scaled again"
    fix = "longctx=none, which trains with the scaling that it has"
    raise Refused(
        Problem(
            key=KEY,
            value=kind,
            why=why,
            fix=fix + (f", or longctx={_kind(now)}" if _kind(now) in AGAIN else ""),
        )
    )


def _kind(parameters: Mapping[str, Any]) -> str:
    return parameters.get("rope_type") or parameters.get("type") or "default"


def _ordered(kind: str, parameters: Mapping[str, Any]) -> None:
    for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
        if low in parameters and parameters[low] >= parameters[high]:
            why = f"must be less than longctx.{high}={parameters[high]:g}: between the two, {kind} blends"
            raise Refused(
                Problem(key=f"longctx.{low}", value=parameters[low], why=why, fix=f"a smaller longctx.{low}")
            )


def _searched(parameters: Mapping[str, Any], count: int) -> None:
    """Refuses LongRoPE without factors, or with another number of them than the model has frequencies."""
    problems = []
    for name in ("short_factor", "long_factor"):
        given = parameters[name]
        if given is None or len(given) != count:
            why = "LongRoPE divides each frequency by a factor that was searched for this model, and none are given"
            if given is not None:
                why = f"has {len(given)} numbers, and this model has {count} frequencies"
            problems.append(
                Problem(
                    key=f"longctx.{name}",
                    value="null" if given is None else f"{len(given)} numbers",
                    why=why,
                    fix=f"longctx.{name}=[...], {count} numbers; or longctx=yarn, which needs none",
                    source="arXiv:2402.13753",
                )
            )
    if problems:
        raise Refused(problems)
