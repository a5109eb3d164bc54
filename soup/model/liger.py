"""Liger's kernels (arXiv:2410.10989): for which models, and how they get onto one. No torch at import.

They are written in Triton, which needs a GPU; none has run them here yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from soup.errors import Problem, Refused

KEY = "training.use_liger"
# model_type of a config.json: the table of liger-kernel 0.8.5, which a test compares
_TYPES = """
deepseek_v2 deepseek_v3 deepseek_v4 exaone4 falcon_h1 gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text glm4 glm4v
glm4v_moe gpt_oss granite hunyuan_v1_dense hunyuan_v1_moe internvl llama llama4 llama4_text llava ministral mistral
mixtral mllama mllama_text_model muse_glimmer nemotron olmo2 olmo3 paligemma phi3 pixtral qwen2 qwen2_5_vl
qwen2_5_vl_text qwen2_vl qwen2_vl_text qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
qwen3_vl qwen3_vl_moe qwen3_vl_moe_text qwen3_vl_text smollm3 smolvlm
"""
TYPES = frozenset(_TYPES.split())


def refuse_unfit(asked: bool, model: Mapping[str, Any], targets: Any) -> None:
    """Refuses a model that Liger has no kernels for, and adapters on a head that its loss reads past them."""
    if not asked:
        return
    kind = model.get("model_type")
    if kind not in TYPES:
        why = f"Liger has no kernels for model_type={kind}, and would change nothing"
        raise Refused(Problem(key=KEY, value="true", why=why, fix=f"{KEY}=false"))
    if "lm_head" in ([targets] if isinstance(targets, str) else targets):
        why = "Liger's loss reads the head's own weight, so an adapter on it would not be trained"
        raise Refused(
            Problem(key=KEY, value="true", why=why, fix=f"{KEY}=false, or no lm_head in lora.target_modules")
        )


def put_on(trainer: Any) -> None:
    """Patches the trainer's model now: transformers does it when training begins, after the settings were proved."""
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
