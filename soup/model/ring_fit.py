"""What in a model's config.json ring attention does not compute. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from soup.errors import Problem, Refused
from soup.model.attention import RING_KEY, described
from soup.rope import current

FULL, SLIDING = "full_attention", "sliding_attention"
# Families whose classes in transformers 5.17 have an attention of their own, without its interface.
OWN = {"biogpt", "bloom", "codegen", "cpmant", "falcon", "gpt_neo", "gpt_neox_japanese", "gptj", "mpt"}
OWN |= {"openai-gpt", "stablelm", "xglm"}
STATES = ("layers_block_type", "hybrid_override_pattern", "attn_layer_period", "ssm_cfg", "mamba_d_state")


def refuse_unfit(model: Mapping[str, Any], longest: int | None = None) -> None:
    """Refuses a model whose tokens reach one another by other ways than causal attention to all before.

    `longest`: tokens of the longest row, where it is known.
    """
    if (found := obstacle(model, longest)) is not None:
        why, fix = found
        raise Refused(Problem(key=RING_KEY, value="true", why=why, fix=f"{fix}{RING_KEY}=false"))


def obstacle(model: Mapping[str, Any], longest: int | None) -> tuple[str, str] | None:
    """Why not, and what else to change, `None` where nothing is known to be in the way."""
    model = model.get("text_config") or model
    name = f"this {model.get('model_type')} model"
    kinds = set(model.get("layer_types") or ())
    rotary = current(model).get("rope_type") or current(model).get("type")
    if rotary in ("dynamic", "longrope"):
        why = f"the {rotary} rotary embedding of {name} follows the length of a row, of which each process sees a part"
        return why, ""
    if other := sorted(kinds - {FULL, SLIDING}):
        return f"{name} has layers of {other[0]}, which hand on more than keys and values", ""
    if any(model.get(key) for key in STATES):
        return f"{name} has layers that hand on a state, beside its keys and values", ""
    if model.get("model_type") in OWN and not model.get("auto_map"):
        return f"{name} does not take its attention from transformers' interface", "another model, or "
    window = window_of(model)
    if window is not None and longest is not None and window < longest:
        return (
            f"a row has {longest} tokens, and {name} looks back {window} in some layers: a ring has no such windows",
            f"data.max_length={window}, or ",
        )
    if model.get("attn_logit_softcapping") is not None:
        return f"{name} caps its attention scores, and the kernels with a log-sum-exp do not", ""
    if model.get("model_type") == "gpt_oss":
        return f"{name} has attention sinks, which no kernel with a log-sum-exp has", ""
    if described(model)["dropout"] > 0:
        why = f"the config.json of {name} asks for dropout on attention weights, which are never whole in a ring"
        return why, "attention_dropout (GPT-2's attn_pdrop) of 0 in its config.json, or "
    return None


def window_of(model: Mapping[str, Any]) -> int | None:
    """Tokens that some layers look back, `None` where all see the whole row."""
    window = model.get("sliding_window")
    kinds = model.get("layer_types")
    used = SLIDING in kinds if kinds else model.get("use_sliding_window", True)
    return int(window) if window is not None and used else None
