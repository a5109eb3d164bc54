"""What a run will cost, from the configuration, the model's config.json and length statistics: no weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from soup.device import Device
from soup.errors import Problem, Refused
from soup.packing import estimate
from soup.plan.decoder import Shape, adapter_parameters, shape
from soup.plan.fits import frozen_layers, refuse_unfit
from soup.plan.memory import BYTES, optimizer_bytes, peak, proving
from soup.plan.spread import devices
from soup.plan.unpadded import alike, row_tokens, without_padding
from soup.rope import scaling
from soup.schema import Config

__all__ = ["Lengths", "Plan", "Shape", "adapter_parameters", "plan", "shape"]

CHECKPOINTS_KEPT = 2


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Statistics of the training rows, in tokens after truncation. `sampled`: estimated from the first rows.

    `sample`: lengths in order that stand for all; none where they are not known. `common`: tokens that all rows begin
    with; `shared`: those that the sides of a pair do, on average.
    """

    rows: int
    mean: float
    p50: int
    p95: int
    max: int
    tokens: int
    learnt: int
    sampled: bool
    eval_rows: int
    sample: tuple[int, ...] = ()
    common: int = 0
    shared: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predictions for one device. `memory` adds up to `peak_memory_bytes`; `notes` gives each number's reason.

    `devices`: how many devices such a run takes, 0 where no number is enough; `ring` of them share each row.
    """

    parameters: int
    trainable: int
    dtype: str
    rows_per_step: int
    tokens_per_step: int
    steps: int
    tokens: int
    memory: dict[str, int]
    peak_memory_bytes: int
    host_memory_bytes: int
    disk_bytes: int
    devices: int
    ring: int
    sampled: bool
    notes: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(config: Config, *, model: Mapping[str, Any], device: Device, lengths: Lengths) -> Plan:
    """Predicts size, steps, peak memory of one device, and disk.

    Raises:
        Refused: the data do not fill a single step of a task that leaves smaller ones out, or a row is longer than
            the model's context, or that one cannot be stretched as asked.
    """
    decoder = shape(model)
    stretched = scaling(config, model)
    longest = min(config.data.max_length, lengths.max)
    dtype, why = dtype_of(config, device)
    refuse_unfit(config, model, decoder, device, longest, dtype)
    training, task, lora = config.training, config.task, config.lora
    notes: dict[str, str] = {} if stretched is None else {"context": f"{stretched.kind}: {stretched.reason}"}
    adapters = adapter_parameters(config, decoder)
    frozen = frozen_layers(config, decoder)
    trainable = adapters if lora.r is not None else decoder.total - decoder.bottom(frozen)
    kind = model.get("model_type")
    notes["parameters"] = (
        f"from config.json ({kind})"
        if decoder.known
        else f"an estimate: {kind} is counted as a {'dense Llama' if decoder.experts == 1 else 'Mixtral'}"
    )
    notes["trainable"] = (
        f"all weights but those of {frozen} of {decoder.layers} layers"
        if lora.r is None and frozen
        else "all weights"
        if lora.r is None
        else f"adapters of rank {lora.r} on {config.tree['lora']['target_modules']}"
        + (f" and {decoder.experts} experts" if training.moe_lora else "")
    )

    notes["dtype"] = why
    replicas = config.replicas
    rows_per_step = training.batch_size * training.gradient_accumulation_steps * replicas
    notes["rows_per_step"] = (
        f"{training.batch_size} per device x {training.gradient_accumulation_steps} accumulation"
        f" x {replicas} replicas"
    )
    sequences = lengths.rows * task.samples
    mean = lengths.mean
    if training.packing:
        sequences, notes["packing"] = _packed(config, lengths)
        mean = round(min(config.data.max_length, lengths.tokens / sequences), 1)
        longest = min(config.data.max_length, lengths.tokens)
    if training.curriculum and training.curriculum_metric == "loss":
        notes["curriculum"] = (
            f"the base model's loss of {lengths.rows} rows is measured first, once for all runs"
        )
    micro = math.ceil(sequences / (training.batch_size * replicas))
    per_epoch = max(1, math.ceil(micro / training.gradient_accumulation_steps))
    if task.drop_last:
        per_epoch = sequences // rows_per_step
        if per_epoch == 0:
            raise Refused(
                Problem(
                    key="training.batch_size",
                    value=training.batch_size,
                    why=f"a step takes {rows_per_step} sequences, and the data give {sequences}",
                    fix="a smaller training.batch_size or training.gradient_accumulation_steps, or more data",
                )
            )
    steps = training.max_steps or math.ceil(training.epochs * per_epoch)
    notes["steps"] = (
        "training.max_steps"
        if training.max_steps
        else f"{training.epochs:g} epochs x {per_epoch} steps ({sequences} rows / {rows_per_step} per step)"
    )
    tokens_per_step = round((mean + task.generates) * rows_per_step * task.forwards)
    notes["tokens_per_step"] = f"{rows_per_step} rows x {mean:g} tokens on average x {task.forwards}"
    if task.generates:
        notes["tokens_per_step"] += f", and up to {task.generates} generated"

    fullest = longest
    if without_padding(config) and not training.packing:
        batches = steps * training.gradient_accumulation_steps
        average = row_tokens(lengths.sample, training.batch_size * task.forwards, batches)
        if average is not None:
            rows = training.batch_size
            once = alike(rows, lengths.common, lengths.shared)
            fullest = min(longest, math.ceil(average - once / (rows * task.learnt_from)))
    parts, notes["memory"] = peak(config, decoder, device, fullest, dtype, trainable, adapters)
    if fullest < longest:
        notes["memory"] += (
            f"; rows of {fullest} tokens on average in the fullest batch, without padding, and with what they begin"
            " with alike once"
        )
    spread = config.distributed
    cut = (
        ("weights", "reference")
        if spread.spread in ("deepspeed", "fsdp") and "weights" in spread.shards
        else ()
    )
    whole = spread.world * sum(parts.get(name, 0) for name in cut)
    host = 0.0
    for name in config.distributed.offloads:
        host += parts[name] if device.kind == "cuda" else 0
        if device.kind == "cuda":
            parts[name] = 0
    loading = whole + parts["runtime"] - sum(parts.values())
    if cut and loading > 0:
        parts["loading"] = loading
        notes["loading"] = f"each device holds the whole model, {whole / 1e9:.1f} GB, before it is cut"
    beyond = (
        parts["runtime"] + proving(config, decoder, device, dtype, longest, adapters) - sum(parts.values())
    )
    if beyond > 0 and spread.world == 1:
        parts["proof"] = beyond
        notes["proof"] = (
            "before the first step the loss is measured in float32, which takes more than training does"
        )
    memory = {name: round(size) for name, size in parts.items()}
    row = longest if stretched is None else max(longest, config.data.max_length)
    needs, notes["devices"] = devices(config, model, decoder, device, row, dtype, trainable, adapters)
    saved = 4 * adapters if lora.r is not None else BYTES[dtype] * decoder.total
    beside = task.trained_models * decoder.total  # PPO's value model, in float32
    state = optimizer_bytes(config, decoder, trainable + beside)
    disk = CHECKPOINTS_KEPT * (saved + 4 * beside + state) + saved
    notes["disk"] = f"{CHECKPOINTS_KEPT} checkpoints with optimizer state, and the final model"
    return Plan(
        parameters=decoder.total,
        trainable=trainable,
        dtype=dtype,
        rows_per_step=rows_per_step,
        tokens_per_step=tokens_per_step,
        steps=steps,
        tokens=tokens_per_step * steps,
        memory=memory,
        peak_memory_bytes=sum(memory.values()),
        host_memory_bytes=round(host),
        disk_bytes=round(disk),
        devices=needs.devices,
        ring=needs.ring,
        sampled=lengths.sampled,
        notes=notes,
    )


def _packed(config: Config, lengths: Lengths) -> tuple[int, str]:
    """Rows that the documents fill, by best fit of lengths like theirs, and how full those are."""
    training, size = config.training, config.data.max_length
    sequences = math.ceil(lengths.tokens / size)
    if lengths.sample:
        buckets = training.curriculum_buckets if training.curriculum else 1
        by_length = training.curriculum_metric == "length"
        sequences = estimate(lengths.sample, lengths.rows, size, buckets=buckets, by_length=by_length)
        sequences = max(sequences, math.ceil(lengths.tokens / size))
    full = lengths.tokens / (sequences * size)
    within = f", packed within {training.curriculum_buckets} buckets" if training.curriculum else ""
    return (
        sequences,
        f"about {sequences} rows of {size} tokens from {lengths.rows} documents, {full:.0%} full{within}",
    )


def dtype_of(config: Config, device: Device) -> tuple[str, str]:
    """The dtype that weights are held in, with its reason; the training process decides by the same rule."""
    asked = config.model.dtype
    if asked != "auto":
        return asked, f"model.dtype={asked}"
    if not device.bf16:
        return "float32", device.reason
    if config.lora.r is None:
        return "float32", f"all weights train, with bfloat16 products: {device.reason}"
    return "bfloat16", device.reason
