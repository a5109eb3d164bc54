"""What a run will cost, from the configuration, the model's config.json and length statistics: no weight is loaded.

Activation memory follows what autograd keeps of a decoder layer (Korthikanti et al. 2022, arXiv:2205.05198, with
SwiGLU, RMSNorm and memory-linear attention). bench/plan_accuracy.py compares predicted and measured peaks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from soup import mixture
from soup.device import Device
from soup.errors import Problem, Refused
from soup.model import attention, liger
from soup.model.groups import whole_groups
from soup.packing import estimate
from soup.rope import context as reach
from soup.rope import scaling
from soup.rules import broken, facts
from soup.rules.moe import experts, is_moe
from soup.schema import Config
from soup.spread import Spread, spread

RUNTIME_BYTES = {"cpu": 750e6, "cuda": 1.5e9}  # the process with its libraries (measured); CUDA's context
ALLOCATOR = 1.1  # freed blocks that malloc keeps: measured activations over the tensors counted below
# Of the activations that checkpointing frees, what glibc's malloc keeps as holes between the ones that stay
# (measured; giving it back to the system at once costs six times the step's time). A GPU's allocator reuses them.
HOLES = {"cpu": 0.55, "cuda": 0.0}
LOGIT_CHUNK = (
    256  # learnt tokens that TRL turns into logits at once (sft_trainer._CHUNKED_LM_HEAD_CHUNK_SIZE)
)
LOSS_TOKENS = 2048  # of a batch whose loss is measured for the curriculum, padding included
LOGIT_COPIES = 6  # logits, log-softmax, their exponent and product, and two gradients, in float32
NF4_BYTES = 0.516  # a weight and its share of doubly quantized scales (arXiv:2305.14314, section 3)
# Weights that share a scale. bitsandbytes 0.50's AVX512 kernel mistakes a block that goes on in the next row.
NF4_BLOCK = 64
WITHOUT_LINEAR = ("gpt2", "openai-gpt")
SIMULATED_COPIES = 6  # of the largest layer's weight in float32, while it is rounded
CHECKPOINTS_KEPT = 2
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Statistics of the training rows, in tokens after truncation. `sampled`: estimated from the first rows.

    `sample`: lengths in order that stand for all; none where they are not known.
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


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder's linear layers as (name, inputs, outputs, copies) of one layer, and what lies outside them.

    `dense`: numbers of the layers of an MoE model that have no experts, with linear layers of their own.
    """

    layers: int
    hidden: int
    heads: int  # width of all query heads
    kv: int  # width of all key heads
    ff: int  # width that one token passes
    vocab: int
    linears: tuple[tuple[str, int, int, int], ...]
    experts: int
    per_layer_other: int
    outside: int
    known: bool
    dense: tuple[int, ...] = ()
    dense_linears: tuple[tuple[str, int, int, int], ...] = ()
    dense_other: int = 0

    def layer(self, number: int) -> tuple[tuple[str, int, int, int], ...]:
        """The linear layers of one layer."""
        return self.dense_linears if number in self.dense else self.linears

    @property
    def linear(self) -> int:
        return sum(i * o * copies for number in range(self.layers) for _, i, o, copies in self.layer(number))

    @property
    def total(self) -> int:
        return self.bottom(self.layers) + self.outside

    def bottom(self, layers: int) -> int:
        """Parameters of the bottom layers."""
        linear = sum(i * o * copies for number in range(layers) for _, i, o, copies in self.layer(number))
        dense = sum(number < layers for number in self.dense)
        return linear + dense * self.dense_other + (layers - dense) * self.per_layer_other


KNOWN = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v3",
)


def shape(model: Mapping[str, Any]) -> Shape:
    """Reads a config.json; exact for the architectures in KNOWN, an estimate of a dense Llama for others."""
    model = model.get("text_config") or model
    kind = model.get("model_type", "")
    hidden = int(model.get("hidden_size") or model.get("n_embd") or 1024)
    layers = int(model.get("num_hidden_layers") or model.get("n_layer") or 1)
    heads = int(model.get("num_attention_heads") or model.get("n_head") or 1)
    width = int(model.get("head_dim") or hidden // heads)
    kv = int(model.get("num_key_value_heads") or heads) * width
    query = heads * width
    vocab = int(model.get("vocab_size") or 32000)
    ff = int(model.get("intermediate_size") or 4 * hidden)
    linears: list[tuple[str, int, int, int]] = [
        ("q_proj", hidden, query, 1),
        ("k_proj", hidden, kv, 1),
        ("v_proj", hidden, kv, 1),
        ("o_proj", query, hidden, 1),
    ]
    other = 2 * hidden  # norms
    if model.get("kv_lora_rank"):
        linears, norms, query = mixture.latent_attention(model, hidden, heads)
        other, kv = other + norms, query
    if kind == "olmoe":
        other += query + kv  # norms of q and k
    if kind == "qwen2" or kind == "qwen2_moe" and model.get("qkv_bias", True):
        other += query + 2 * kv  # biases of q, k and v
    if kind.startswith("qwen3"):
        other += 2 * width  # norms of q and k
    if model.get("attention_bias") and kind in ("llama", "mistral", "qwen3", "qwen3_moe"):
        other += query + 2 * kv + hidden
    if model.get("mlp_bias"):
        other += 2 * ff + hidden
    dense_linears, dense_other, dense = (), 0, ()
    if is_moe(model):
        dense = mixture.dense_layers(model, layers)
        dense_linears, dense_other = (*linears, *mixture.gated("mlp.", hidden, ff)), other
        sparse, router, ff = mixture.feed_forward(model, hidden)
        linears, other = linears + sparse, other + router
    else:
        linears += mixture.gated("", hidden, ff)
    tied = bool(model.get("tie_word_embeddings", kind in ("gemma", "gemma2", "gemma3_text")))
    return Shape(
        layers=layers,
        hidden=hidden,
        heads=query,
        kv=kv,
        ff=ff,
        vocab=vocab,
        linears=tuple(linears),
        experts=experts(model),
        per_layer_other=other,
        outside=vocab * hidden * (1 if tied else 2) + hidden,
        known=kind in KNOWN,
        dense=dense,
        dense_linears=dense_linears,
        dense_other=dense_other,
    )


def adapter_parameters(config: Config, decoder: Shape) -> int:
    """Parameters of the adapters: A and B of each adapted layer above the frozen ones, and DoRA's magnitudes.

    An expert has an A and a B of its own beside each matrix that is fused.
    """
    spec = config.lora
    if spec.r is None:
        return 0
    total = 0
    for number in range(config.training.frozen(decoder.layers), decoder.layers):
        for name, inputs, outputs, copies in decoder.layer(number):
            if _adapted(config, name):
                total += copies * spec.r * (inputs + outputs) + (outputs if spec.use_dora else 0)
    return total


def _adapted(config: Config, name: str) -> bool:
    """Whether a linear layer, or fused experts, get adapters; `all-linear` passes an MoE model's MLPs by."""
    if name.startswith("experts."):
        return config.training.moe_lora
    wanted = config.lora.target_modules
    if wanted == "all-linear":
        return "." not in name
    return name in ((wanted,) if isinstance(wanted, str) else wanted)


def plan(config: Config, *, model: Mapping[str, Any], device: Device, lengths: Lengths) -> Plan:
    """Predicts size, steps, peak memory of one device, and disk.

    Raises:
        Refused: the data do not fill a single step of a task that leaves smaller ones out, or a row is longer than
            the model's context, or that one cannot be stretched as asked.
    """
    decoder = shape(model)
    stretched = scaling(config, model)
    _within_context(config, model, lengths)
    _projects(config, decoder)
    _quantizes(config, decoder, device, str(model.get("model_type")))
    _runs(config, model, device)
    training, task, lora = config.training, config.task, config.lora
    notes: dict[str, str] = {} if stretched is None else {"context": f"{stretched.kind}: {stretched.reason}"}
    adapters = adapter_parameters(config, decoder)
    frozen = _frozen_layers(config, decoder)
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

    dtype, notes["dtype"] = _dtype(config, device)
    replicas = max(
        1, config.distributed.world // (config.longctx.ring_size if config.longctx.use_ring_attention else 1)
    )
    rows_per_step = training.batch_size * training.gradient_accumulation_steps * replicas
    notes["rows_per_step"] = (
        f"{training.batch_size} per device x {training.gradient_accumulation_steps} accumulation"
        f" x {replicas} replicas"
    )
    sequences = lengths.rows * task.samples
    mean, longest = lengths.mean, min(config.data.max_length, lengths.max)
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

    parts, notes["memory"] = _memory(config, decoder, device, longest, dtype, trainable, adapters)
    host = 0.0
    for name in config.distributed.offloads:
        host += parts[name] if device.kind == "cuda" else 0
        if device.kind == "cuda":
            parts[name] = 0
    memory = {name: round(size) for name, size in parts.items()}
    row = longest if stretched is None else max(longest, config.data.max_length)
    needs, notes["devices"] = _devices(config, model, decoder, device, row, dtype, trainable, adapters)
    saved = 4 * adapters if lora.r is not None else BYTES[dtype] * decoder.total
    beside = task.trained_models * decoder.total  # PPO's value model, in float32
    state = _optimizer_bytes(config, decoder, trainable + beside)
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


def _within_context(config: Config, model: Mapping[str, Any], lengths: Lengths) -> None:
    """Refuses a row that, with what is generated after it, reaches positions that the model was not made for."""
    context = reach(model)
    longest = min(config.data.max_length, lengths.max)
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


def _runs(config: Config, model: Mapping[str, Any], device: Device) -> None:
    """Refuses kernels that were asked for and have nothing for this model, whatever the machine has."""
    training = config.training
    dtype = "bfloat16" if config.model.dtype == "auto" else config.model.dtype
    attention.refuse_unfit(training.use_flash_attn, model, device.kind, dtype)
    liger.refuse_unfit(training.use_liger, model, config.tree["lora"].get("target_modules", ()))


def _frozen_layers(config: Config, decoder: Shape) -> int:
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


def _dtype(config: Config, device: Device) -> tuple[str, str]:
    """The dtype that weights are held in, with its reason; the training process decides by the same rule."""
    asked = config.model.dtype
    if asked != "auto":
        return asked, f"model.dtype={asked}"
    if not device.bf16:
        return "float32", device.reason
    if config.lora.r is None:
        return "float32", f"all weights train, with bfloat16 products: {device.reason}"
    return "bfloat16", device.reason


def _memory(
    config: Config,
    decoder: Shape,
    device: Device,
    longest: int,
    dtype: str,
    trainable: int,
    adapters: int,
) -> tuple[dict[str, float], str]:
    """Bytes on one device at the peak, by what they are for."""
    training, task, spread = config.training, config.task, config.distributed
    size = BYTES[dtype]
    products = (
        2 if device.bf16 and dtype != "float32" or device.bf16 and config.model.dtype == "auto" else size
    )
    per_weight = {"none": size, "4bit": NF4_BYTES, "8bit": 1.01}
    frozen = decoder.linear * per_weight[config.model.stored] + (decoder.total - decoder.linear) * size
    weights = frozen + 4 * adapters
    copies = task.reference and config.lora.r is None and not task.precompute_ref
    beside = {  # models that other tasks do not have
        "reference": frozen if copies else 0,  # with adapters it is the model with those off
        "reward model": task.frozen_models * size * decoder.total,  # PPO's are not quantized
        "value model": task.trained_models * 4 * decoder.total,  # trains in float32
    }
    train_size = 4 if config.lora.r is not None else size

    ring = config.longctx.ring_size if config.longctx.use_ring_attention else 1
    length = longest + task.generates
    batch_tokens = training.batch_size * task.forwards * length / ring
    one_layer = _layer_floats(decoder) * products
    if config.lora.use_dora:  # the frozen layer's output and the adapter's, each scaled by a magnitude
        one_layer += (
            2 * sum(outputs for name, _, outputs, _ in decoder.linears if _adapted(config, name)) * products
        )
    if training.gradient_checkpointing:
        holes = HOLES[device.kind] * decoder.layers * one_layer
        activations = batch_tokens * (decoder.layers * decoder.hidden * products + one_layer + holes)
        how = "each layer's input, and one layer recomputed" + (", and malloc's holes" if holes else "")
    else:
        # Below the lowest adapter nothing needs a gradient.
        kept = decoder.layers - (training.frozen(decoder.layers) if config.lora.r is not None else 0)
        activations = batch_tokens * kept * one_layer
        how = "what backward needs of every layer" + (
            " above the frozen ones" if kept < decoder.layers else ""
        )
    if config.model.quantization_aware:
        activations += _simulated_weights(config, decoder, products)
        how += "; each layer's rounded weight"
    if training.moe_lora:  # PEFT computes with the sum of the experts and their adapters, a copy in each pass
        copied = (
            2 if training.gradient_checkpointing else 1 + kept
        )  # and its gradient, of one layer at a time
        one = sum(i * o * copies for name, i, o, copies in decoder.linears if name.startswith("experts."))
        activations += copied * one * size / ALLOCATOR
        how += ", with a copy of its experts"
    if task.config == "trl:SFTConfig":
        logits = min(LOGIT_CHUNK, batch_tokens) * decoder.vocab * 4 * LOGIT_COPIES
        how_logits = f"{LOGIT_CHUNK} learnt tokens at a time"
    else:
        logits = batch_tokens * decoder.vocab * 4 * 3
        how_logits = "every token of the batch"
    if task.trained_models:  # those of all answers of a step, and a padded copy (TRL's batch_generation)
        rollouts = training.batch_size * training.gradient_accumulation_steps * task.generates
        logits = max(logits, rollouts * decoder.vocab * 4 * 2)
        how_logits += ", or twice those of every generated token of a step, whichever is more"
    if training.curriculum and training.curriculum_metric == "loss":
        whole = max(LOSS_TOKENS, longest) * decoder.vocab * size + longest * decoder.vocab * 8
        if whole > logits:
            logits, how_logits = whole, "every token, while the base model's loss is measured"
    world = spread.world
    shared = world if "weights" in spread.shards else 1
    parts = {
        "weights": weights / shared,
        **{name: held / shared for name, held in beside.items() if held},
        "gradients": (train_size * trainable + task.trained_models * 4 * decoder.total)
        / (world if "gradients" in spread.shards else 1),
        "optimizer": _optimizer_bytes(config, decoder, trainable + task.trained_models * decoder.total)
        / (world if "optimizer" in spread.shards else 1),
        "activations": ALLOCATOR * activations,
        "logits": logits,
        "runtime": RUNTIME_BYTES[device.kind],
    }
    note = f"batch of {training.batch_size} x {length} tokens; activations: {how}; logits: {how_logits}"
    return parts, note


def _simulated_weights(config: Config, decoder: Shape, products: int) -> float:
    """Rounded weights that backward needs, of one layer where it is recomputed, and the largest one's copies.

    Weights that train also keep a byte each: whether the rounding let their gradient through.
    """
    kept = decoder.linear / (decoder.layers if config.training.gradient_checkpointing else 1)
    largest = max(inputs * outputs for _, inputs, outputs, _ in decoder.linears)
    return kept * (products + (config.lora.r is None)) + SIMULATED_COPIES * 4 * largest


def _devices(
    config: Config,
    model: Mapping[str, Any],
    decoder: Shape,
    device: Device,
    row: int,
    dtype: str,
    *sizes: int,
) -> tuple[Spread, str]:
    """How many devices hold this run with rows of `row` tokens, where the rules let it be spread, and why so many."""
    alone = replace(
        config,
        distributed=replace(config.distributed, processes=1, nodes=1, shards=(), offloads=()),
        longctx=replace(config.longctx, use_ring_attention=False, ring_size=1),
    )
    capacity = device.memory_bytes

    def needed(checkpointing: bool, **allowed: bool) -> Spread:
        training = replace(config.training, gradient_checkpointing=checkpointing)
        whole, _ = _memory(replace(alone, training=training), decoder, device, row, dtype, *sizes)
        return spread(whole, capacity, **allowed)

    allowed = {"shards": False, "rings": False}
    found = needed(config.training.gradient_checkpointing, **allowed)
    if found.devices != 1:
        here = facts(config, device=device.kind, model_config=model)
        many = {"distributed": "zero3", "distributed.processes": 2}
        ring = {"longctx.use_ring_attention": True, "longctx.ring_size": 2}
        allowed = {"shards": not broken(here | many), "rings": not broken(here | many | ring)}
        found = needed(config.training.gradient_checkpointing, **allowed)
    each = f"{capacity / 1e9:.0f} GB each ({device.memory_reason})"
    tokens = f"a batch of {config.training.batch_size} x {row + config.task.generates} tokens"
    if found.devices == 0:
        note = f"no number of devices of {each} holds {tokens}"
        if not allowed["rings"]:
            note += ": this task's rows are not spread over devices"
    elif found.devices == 1:
        note = f"one of {each} holds {tokens}"
    else:
        note = f"of {each} hold {tokens}: {found.bytes / 1e9:.0f} GB on each"
        note += f", with distributed=zero3 distributed.processes={found.devices}" if found.sharded else ""
        if found.ring > 1:
            note += f" longctx.use_ring_attention=true longctx.ring_size={found.ring}"
    if found.devices != 1 and not config.training.gradient_checkpointing:
        less = needed(True, **allowed).devices
        if less and (less < found.devices or not found.devices):
            note += f"; {less} with training.gradient_checkpointing=true"
    return found, note


def _layer_floats(decoder: Shape) -> float:
    """Numbers that backward needs of one layer, for one token.

    Two norms keep input, normalised and scaled values (6 d); q and k before and after the rotation, v, and k and v
    repeated for grouped queries; the attention's output; gate, up, their activation and product (4 ff), of the few
    experts that a token passes in an MoE model.
    """
    attention = 2 * (decoder.heads + decoder.kv) + decoder.kv + decoder.heads
    repeated = 2 * decoder.heads if decoder.kv < decoder.heads else 0
    return 6 * decoder.hidden + attention + repeated + 4 * decoder.ff


def _optimizer_bytes(config: Config, decoder: Shape, trainable: int) -> float:
    """State of the optimizer; GaLore keeps its moments in the projection, and the projection itself; Muon one moment
    of matrices."""
    if config.optim.muon is not None and config.lora.r is None:  # AdamW's second moment for what is no matrix
        layers = decoder.layers - config.training.frozen(decoder.layers)
        return config.optim.state_bytes * (2 * trainable - decoder.linear // decoder.layers * layers)
    if config.optim.galore is None:
        return config.optim.state_bytes * trainable
    rank = config.optim.galore["rank"]
    state = 0.0
    for _, inputs, outputs, copies in decoder.linears:
        short, long = sorted((inputs, outputs))
        r = min(rank, short)
        state += copies * (config.optim.state_bytes * r * long + 4 * r * short)
    layers = decoder.layers - config.training.frozen(decoder.layers)
    plain = trainable - decoder.linear // decoder.layers * layers
    return state * layers + config.optim.state_bytes * plain
