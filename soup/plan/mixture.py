"""Linear layers of mixtures of experts and of latent attention, from a model's config.json: what plans count with.

Layers are (name, inputs, outputs, copies). Names with a dot are of feed-forward layers, which get no adapters by
`lora.target_modules`; fused experts (`experts.`) get them by `training.moe_lora`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from soup.rules.moe import experts

Linears = list[tuple[str, int, int, int]]


def feed_forward(model: Mapping[str, Any], hidden: int) -> tuple[Linears, int, int]:
    """An MoE layer's linear layers, its other parameters (the router), and the width that one token passes."""
    number = experts(model)
    width = int(model.get("moe_intermediate_size") or model.get("intermediate_size") or 4 * hidden)
    linears = [
        ("experts.gate_up_proj", hidden, 2 * width, number),
        ("experts.down_proj", width, hidden, number),
    ]
    other = hidden * number
    shared = int(model.get("shared_expert_intermediate_size") or 0)
    if shared:
        other += hidden  # Qwen2-MoE's gate of the shared expert
    shared = shared or width * int(model.get("n_shared_experts") or 0)
    if shared:
        linears += gated("shared_experts.", hidden, shared)
    return linears, other, width * int(model.get("num_experts_per_tok") or 2) + shared


def gated(prefix: str, hidden: int, width: int) -> Linears:
    """The three matrices of SwiGLU (arXiv:2002.05202)."""
    return [
        (f"{prefix}gate_proj", hidden, width, 1),
        (f"{prefix}up_proj", hidden, width, 1),
        (f"{prefix}down_proj", width, hidden, 1),
    ]


def dense_layers(model: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Numbers of an MoE model's layers that have no experts."""
    first = int(model.get("first_k_dense_replace") or 0)
    every = int(model.get("decoder_sparse_step") or 1)
    named = model.get("mlp_only_layers") or ()
    return tuple(n for n in range(layers) if n < first or (n + 1) % every or n in named)


def latent_attention(model: Mapping[str, Any], hidden: int, heads: int) -> tuple[Linears, int, int]:
    """DeepSeek's attention (arXiv:2405.04434, section 2.1): linear layers, other parameters, width of all queries."""
    nope, rope, value = (int(model[f"{name}_head_dim"]) for name in ("qk_nope", "qk_rope", "v"))
    compressed, query = int(model["kv_lora_rank"]), model.get("q_lora_rank")
    queries = heads * (nope + rope)
    linears: Linears = [
        ("kv_a_proj_with_mqa", hidden, compressed + rope, 1),
        ("kv_b_proj", compressed, heads * (nope + value), 1),
        ("o_proj", heads * value, hidden, 1),
    ]
    other = compressed  # a norm
    biases = compressed + rope + hidden
    if query is None:
        linears.append(("q_proj", hidden, queries, 1))
    else:
        linears += [("q_a_proj", hidden, int(query), 1), ("q_b_proj", int(query), queries, 1)]
        other += int(query)
        biases += int(query)
    return linears, other + (biases if model.get("attention_bias") else 0), queries
