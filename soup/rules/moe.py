"""What a config.json says of a mixture of experts, for rules and plans. Never torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

# Families whose class adds a load-balancing loss (arXiv:2101.03961, equations 4 to 6) that TRL's trainers read: a
# test computes it for each. DeepSeek's balance by a bias of the router (arXiv:2408.15664) and have none; of Granite's
# and Phi's TRL 1.12 does not find the number of experts.
BALANCED = frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "flex_olmo"})
BALANCED |= {"gpt_oss", "jamba", "minimax_m2"}

# Names of the matrices that transformers 5 fuses. PEFT reads them as the fused parameters' in a MoE model.
EXPERT_NAMES = frozenset(
    {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "w1", "w2", "w3", "gate", "router"}
)
EXPERT_NAMES |= {"shared_expert_gate", "experts", "mlp"}


def experts(model_config: Mapping[str, Any]) -> int:
    """Routed experts of an MoE layer, 1 of a dense model."""
    text = model_config.get("text_config") or model_config
    return max(1, *(found for key in COUNTS if isinstance(found := text.get(key), int)), 1)


def is_moe(model_config: Mapping[str, Any]) -> bool:
    """Whether a model's config.json describes a mixture of experts."""
    return experts(model_config) > 1


def is_balanced(model_config: Mapping[str, Any]) -> bool:
    """Whether training can add the router's balancing loss."""
    text = model_config.get("text_config") or model_config
    return is_moe(model_config) and text.get("model_type") in BALANCED


def names_experts(target_modules: Any) -> bool:
    """Whether `lora.target_modules` names what an MoE model holds as experts, or their router."""
    names = [target_modules] if isinstance(target_modules, str) else target_modules or []
    return any(str(name).rpartition(".")[2] in EXPERT_NAMES for name in names)
