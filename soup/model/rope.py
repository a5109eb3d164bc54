"""Rotary scaling put into a model's configuration, from which its layers are built. Needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.nn import Module
from transformers import AutoConfig

from soup.errors import Problem, Refused
from soup.rope import KEY, LAYERED, Scaling, current
from soup.specs import ModelSpec

INITIAL = "original_inv_freq"
FOLLOW = ("dynamic", "longrope")


def scaled_config(folder: Path, spec: ModelSpec, scaling: Scaling, **options: Any) -> Any:
    """The folder's configuration with the scaling in it.

    Raises:
        Refused: transformers reads something else in config.json than soup did.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code, **options)
    text = config.get_text_config()
    for name, value in overrides(text, scaling).items():
        setattr(text, name, value)
    text.standardize_rope_params()
    text.validate_rope()
    found = current({"rope_parameters": text.rope_parameters})
    if found["rope_type"] != scaling.kind or text.max_position_embeddings != scaling.positions:
        why = f"{type(text).__name__} turns it into {found['rope_type']} at {text.max_position_embeddings} positions"
        raise Refused(Problem(key=KEY, value=scaling.kind, why=why, fix="longctx=none, or another kind"))
    return config


def overrides(text: Any, scaling: Scaling) -> dict[str, Any]:
    """What changes in a text model's configuration: what transformers' `from_pretrained` takes as arguments too."""
    new = {"rope_type": scaling.kind, "factor": scaling.factor, **scaling.parameters}
    parameters = {name: value for name, value in text.rope_parameters.items() if name != "type"}
    if isinstance(parameters.get(LAYERED), dict):
        parameters |= {LAYERED: parameters[LAYERED] | new}
    else:
        parameters |= new
    found: dict[str, Any] = {"rope_parameters": parameters, "max_position_embeddings": scaling.positions}
    if hasattr(text, "original_max_position_embeddings"):  # Phi-3's place for it, which wins
        found["original_max_position_embeddings"] = scaling.own
    if getattr(text, "head_dim", 0) is None:  # Mixtral's; transformers' formulas multiply it
        found["head_dim"] = text.hidden_size // text.num_attention_heads
    return found


def differing(text: Any) -> dict[str, Any]:
    """What a scaled text model's configuration has that its folder's has not, as arguments of `from_pretrained`."""
    names = ("rope_parameters", "max_position_embeddings", "original_max_position_embeddings", "head_dim")
    return {name: value for name in names if (value := getattr(text, name, None)) is not None}


def forget(model: Module) -> None:
    """Lets the kinds of scaling that follow the length follow each batch's own, as the papers have it.

    transformers keeps the frequencies of the longest batch so far until one within the model's own length comes; then
    a batch's loss would depend on those before it, and a resumed run on batches that it has not seen.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if set(FOLLOW).intersection(kinds.values() if isinstance(kinds, dict) else (kinds,)):
            module.register_forward_hook(_as_built)


def _as_built(rotary: Any, _inputs: Any, _output: Any) -> None:
    for name, buffer in list(rotary.named_buffers(recurse=False, remove_duplicate=False)):
        if name.endswith(INITIAL):
            prefix = name.removesuffix(INITIAL)
            rotary.register_buffer(f"{prefix}inv_freq", buffer.clone(), persistent=False)
            if hasattr(rotary, f"{prefix}max_seq_len_cached"):
                setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)
