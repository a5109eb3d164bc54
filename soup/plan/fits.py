"""What a model's config.json shows to be impossible, refused before a weight is loaded."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from soup.device import Device
from soup.errors import Problem, Refused
from soup.model import attention, liger, ring_fit
from soup.model.groups import whole_groups
from soup.plan.decoder import Shape
from soup.plan.memory import BYTES
from soup.rope import context as reach
from soup.schema import Config

# Weights that share a scale. bitsandbytes 0.50's AVX512 kernel mistakes a block that goes on in the next row.
NF4_BLOCK = 64
STEPS_BY_WEIGHT = ("falcon_mamba", "jamba", "mamba")  # their mixers read dt_proj.weight
WITHOUT_LINEAR = ("gpt2", "openai-gpt")


def refuse_unfit(
    config: Config, model: Mapping[str, Any], decoder: Shape, device: Device, longest: int, dtype: str
) -> None:
    """Refuses what this model cannot do. `longest`: tokens of the longest training row; `dtype`: of the weights.

    Raises:
        Refused: a row is longer than the model's context, or a setting finds nothing in this model to work on.
    """
    _plain(config, model)
    _within_context(config, model, longest)
    _projects(config, decoder)
    _quantizes(config, decoder, device, str(model.get("model_type")))
    _multiplies(config, decoder, str(model.get("model_type")), dtype)
    _adapts(config, str(model.get("model_type")))
    _scores(config, model)
    _runs(config, model, device, longest)


def _plain(config: Config, model: Mapping[str, Any]) -> None:
    """Refuses weights that are stored quantized: what trains starts from plain ones, quantized as soup is asked to."""
    if stored := model.get("quantization_config"):
        why = (
            f"its weights are stored quantized, by {stored.get('quant_method', 'a method that is not named')}"
        )
        fix = (
            "the model that it was made from, and model.quantization=4bit to quantize that while it is loaded"
        )
        raise Refused(Problem(key="model.base", value=config.model.base, why=why, fix=fix))


def _within_context(config: Config, model: Mapping[str, Any], longest: int) -> None:
    """Refuses a row that, with what is generated after it, reaches positions that the model was not made for."""
    context = reach(model)
    if (
        context is None
        or config.longctx.rope_scaling_type != "none"
        or longest + config.task.generates <= context
    ):
        return
    why = f"a row has {longest} tokens, and the model's own context is {context}"
    if config.task.generates:
        why = f"a prompt has {longest} tokens, {config.task.generates} are generated after it, and the model's own "
        why += f"context is {context}"
    room = context - config.task.generates
    fewer = f"data.max_length={room}" if room > 0 else "fewer generated tokens"
    raise Refused(
        Problem(
            key="data.max_length",
            value=config.data.max_length,
            why=why,
            fix=f"{fewer}, or a longer context by longctx=yarn",
        )
    )


def _projects(config: Config, decoder: Shape) -> None:
    """Refuses a rank of GaLore's that is no less than the smaller side of every layer: nothing would be projected."""
    knobs, largest = config.optim.galore, max(min(i, o) for _, i, o, _ in decoder.linears)
    if knobs is not None and knobs["rank"] >= largest:
        why = f"no linear layer of this model has more than {largest} inputs and outputs, so nothing is projected"
        fix = f"optim.galore_rank={max(1, largest // 4)}, or optim=adamw"
        raise Refused(Problem(key="optim.galore_rank", value=knobs["rank"], why=why, fix=fix))


def _quantizes(config: Config, decoder: Shape, device: Device, kind: str) -> None:
    """Refuses layers whose inputs are not whole groups of a scale each, and a model without linear layers."""
    inputs = {name: count for name, count, _, _ in decoder.linears}
    if config.model.quantization_aware:
        if kind in WITHOUT_LINEAR:
            why = f"{kind} has Conv1D layers, and torchao's fake quantization wraps linear ones"
            fix = "model.quantization_aware=false, or another model"
            raise Refused(Problem(key="model.quantization_aware", value="true", why=why, fix=fix))
        whole_groups(config.model, inputs)
    uneven = {name: count for name, count in inputs.items() if count % NF4_BLOCK}
    if uneven and config.model.stored == "4bit" and device.kind == "cpu":
        name, count = next(iter(uneven.items()))
        why = f"on a CPU bitsandbytes reads rows wrongly that are no multiple of {NF4_BLOCK} long, as the {count} "
        why += f"inputs of {name} are"
        fix = "model.quantization=8bit or none"
        raise Refused(Problem(key="model.quantization", value="4bit", why=why, fix=fix))


def _multiplies(config: Config, decoder: Shape, kind: str, dtype: str) -> None:
    """Refuses experts that torch's grouped product does not take: its rows are multiples of 16 bytes."""
    sizes = {side for name, i, o, _ in decoder.linears if name.startswith("experts.") for side in (i, o)}
    uneven = sorted(side for side in sizes if side * BYTES[dtype] % 16)
    if uneven and _grouped(kind):
        why = "torch's grouped product of experts takes rows of a multiple of 16 bytes, and "
        why += f"{uneven[0]} numbers of {dtype} are {uneven[0] * BYTES[dtype]}"
        fix = "a model whose hidden size and experts' width are multiples of 8"
        if not any(side % 4 for side in uneven):
            fix = f"model.dtype=float32, or {fix}"
        raise Refused(Problem(key="model.base", value=config.model.base, why=why, fix=fix))


@cache
def _grouped(kind: str) -> bool:
    """Whether transformers' class of this type gives its experts to the grouped product: read, not imported."""
    found = find_spec("transformers")
    assert found is not None and found.origin is not None
    file = Path(found.origin).parent / f"models/{kind}/modeling_{kind}.py"
    return file.is_file() and "@use_experts_implementation" in file.read_text()


def _adapts(config: Config, kind: str) -> None:
    """Refuses an adapter on a layer that the model's class passes by: it multiplies by the layer's weight itself."""
    wanted = config.lora.target_modules
    asked = wanted == "all-linear" or "dt_proj" in ((wanted,) if isinstance(wanted, str) else wanted or ())
    if config.lora.r is not None and kind in STEPS_BY_WEIGHT and asked and config.model.stored == "none":
        why = f"transformers' {kind} multiplies by the weight of dt_proj itself, so an adapter on it would do nothing"
        fix = "lora.target_modules=[in_proj,x_proj,out_proj], and q_proj,k_proj,v_proj,o_proj where it has attention"
        raise Refused(Problem(key="lora.target_modules", value=wanted, why=why, fix=fix))


def _scores(config: Config, model: Mapping[str, Any]) -> None:
    """Refuses a reward model of a family that transformers has no class with a score for."""
    kind = str(model.get("model_type"))
    own = "AutoModelForSequenceClassification" in (model.get("auto_map") or {})
    if config.task.head == "score" and kind not in scoring() and not own:
        why = f"transformers has no {kind} that ends in a score (a class ...ForSequenceClassification)"
        fix = "model.base of another family, such as llama, qwen2, qwen3, mistral or gemma3"
        raise Refused(Problem(key="task.name", value=config.tree["task"]["name"], why=why, fix=fix))


@cache
def scoring() -> frozenset[str]:
    """Model types with a sequence classifier, by transformers' table: read, not imported, as torch would be."""
    found = find_spec("transformers")
    assert found is not None and found.origin is not None
    tree = ast.parse((Path(found.origin).parent / "models/auto/modeling_auto.py").read_text())
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES":
            names = [pair.elts[0] for pair in ast.walk(node) if isinstance(pair, ast.Tuple)]
            return frozenset(str(name.value) for name in names if isinstance(name, ast.Constant))
    raise LookupError("transformers has no table of sequence classifiers where it had one")


def _runs(config: Config, model: Mapping[str, Any], device: Device, longest: int) -> None:
    """Refuses kernels that were asked for and have nothing for this model, whatever the machine has."""
    training = config.training
    dtype = "bfloat16" if config.model.dtype == "auto" else config.model.dtype
    if config.longctx.use_ring_attention:
        ring_fit.refuse_unfit(model, longest)
    attention.refuse_unfit(training.use_flash_attn, model, device.kind, dtype)
    liger.refuse_unfit(training.use_liger, model, config.tree["lora"].get("target_modules", ()))


def frozen_layers(config: Config, decoder: Shape) -> int:
    """Layers that do not train; refuses to freeze all of them, and a ratio that comes to none."""
    training = config.training
    frozen = training.frozen(decoder.layers)
    key = "freeze_layers" if training.freeze_layers else "freeze_ratio"
    value = getattr(training, key)
    if frozen >= decoder.layers:
        why = f"this model has {decoder.layers} layers, and {decoder.layers - 1} can be frozen: the last must train"
        raise Refused(Problem(key=f"training.{key}", value=value, why=why, fix=f"a smaller training.{key}"))
    if value and not frozen:
        why = f"is less than half of one of this model's {decoder.layers} layers, so none would be frozen"
        raise Refused(Problem(key=f"training.{key}", value=value, why=why, fix="training.freeze_layers=1"))
    return frozen
