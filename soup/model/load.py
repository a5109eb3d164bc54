"""Loads model and tokenizer for training: precision, quantization and adapters. Needs torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

from soup.device import Device
from soup.errors import Problem, Refused
from soup.model.attention import attend
from soup.model.qat import fake_quantize
from soup.model.rope import forget, scaled_config
from soup.rope import Scaling
from soup.specs import LoraSpec, ModelSpec

SCORE = {"score.weight"}  # the head of a reward model, drawn from the seed


@dataclass(frozen=True, kw_only=True)
class Precision:
    """`weights`: dtype that the model is loaded in. `autocast`: dtype of matrix products, `None` for the weights' own.
    Adapters are float32 (PEFT's default), so small updates are not lost; beside quantized weights TRL makes them
    bfloat16, after QLoRA (arXiv:2305.14314).
    """

    weights: torch.dtype
    autocast: torch.dtype | None
    reason: str


def precision(model: ModelSpec, lora: LoraSpec, device: Device) -> Precision:
    """What `model.dtype` comes to on this device."""
    if model.dtype == "auto":
        if not device.bf16:
            return Precision(weights=torch.float32, autocast=None, reason=f"float32: {device.reason}")
        if lora.r is None:
            reason = f"float32 weights, bfloat16 products: all weights train, and {device.reason}"
            return Precision(weights=torch.float32, autocast=torch.bfloat16, reason=reason)
        return Precision(weights=torch.bfloat16, autocast=torch.bfloat16, reason=f"bfloat16: {device.reason}")
    asked = getattr(torch, model.dtype)
    return Precision(
        weights=asked, autocast=None if asked is torch.float32 else asked, reason=f"model.dtype={model.dtype}"
    )


def load_tokenizer(folder: Path, spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with `model.chat_template` if one is given, and a padding token."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    if spec.chat_template is not None:
        from soup.data.encode import template_text

        tokenizer.chat_template = template_text(spec.chat_template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> list[int]:
    """Tokens of a text as it is, or of messages up to where the assistant's answer begins."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def load_model(
    folder: Path,
    spec: ModelSpec,
    precise: Precision,
    device: Device,
    *,
    head: str = "causal",
    router: float | None = None,
    scaling: Scaling | None = None,
    attention: str = "auto",
) -> torch.nn.Module:
    """The causal language model on `device`, quantized or computing as if it were (`soup.model.qat`) if asked.

    With `head="score"` it ends in one new number.

    `router`: the coefficient of an MoE model's balancing loss, which the model reads as it is built; its own if `None`.
    `scaling`: of its rotary embedding.

    `attention` is `training.use_flash_attn`.

    Raises:
        Refused: the folder holds no such model, or not all of its weights.
    """
    quantization = None
    if spec.stored == "4bit":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=precise.autocast or precise.weights,
        )
    elif spec.stored == "8bit":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    options: dict[str, Any] = {"device_map": {"": device.kind}} if quantization is not None else {}
    kind: Any = AutoModelForCausalLM if head == "causal" else AutoModelForSequenceClassification
    changed: dict[str, Any] = {} if head == "causal" else {"num_labels": 1}
    if router is not None:
        changed["router_aux_loss_coef"] = router
    with readable(spec, head):
        if scaling is None:
            options |= changed
        else:
            options["config"] = scaled_config(folder, spec, scaling, **changed)
        model, loaded = kind.from_pretrained(
            folder,
            dtype=precise.weights,
            quantization_config=quantization,
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
            attn_implementation=attend(attention, folder, spec, precise, device, head).implementation,
            **options,
        )
    complete(spec, loaded["missing_keys"])
    forget(model)
    for module in model.modules():
        # At its first evaluation on a CPU with AVX512-BF16, bitsandbytes 0.50 would repack the weights for a kernel
        # that has no gradient, and leave them so.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if spec.quantization_aware:
        fake_quantize(model, spec)
    return model


@contextmanager
def readable(spec: ModelSpec, head: str = "causal") -> Iterator[None]:
    """Turns what loading raises about a folder into a refusal."""
    kind = "causal language model" if head == "causal" else "reward model"
    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        raise Refused(
            Problem(
                key="model.base",
                value=spec.base,
                why=f"cannot be loaded as a {kind}: {str(error).strip().splitlines()[0]}",
                fix="a model folder or name whose config.json describes a causal language model",
            )
        ) from error


def complete(spec: ModelSpec, missing: Iterable[str]) -> None:
    """Refuses a model whose folder lacks weights: transformers would start from random ones."""
    if lacking := sorted(set(missing) - SCORE):
        raise Refused(
            Problem(
                key="model.base",
                value=spec.base,
                why=f"has no weights for {len(lacking)} of the tensors, {lacking[0]} among them",
                fix="a folder whose weights are those of its config.json",
            )
        )


def adapter(spec: LoraSpec, head: str = "causal", *, frozen: str | None = None) -> LoraConfig | None:
    """PEFT's configuration, `None` where all weights train.

    `frozen`: a regular expression for the modules that get none.
    """
    if spec.r is None:
        return None
    modules: str | list[str] = "all-linear"
    if spec.target_modules != "all-linear":  # PEFT would read another text as a regular expression
        one = isinstance(spec.target_modules, str)
        modules = [spec.target_modules] if one else list(spec.target_modules)
    return LoraConfig(
        task_type="SEQ_CLS" if head == "score" else "CAUSAL_LM",
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=modules,
        use_dora=spec.use_dora,
        use_rslora=spec.use_rslora,
        exclude_modules=frozen,
    )
