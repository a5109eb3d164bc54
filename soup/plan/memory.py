"""Bytes that one device needs at the peak of training, by what they are for.

Activation memory follows what autograd keeps of a decoder layer (Korthikanti et al. 2022, arXiv:2205.05198, with
SwiGLU, RMSNorm and memory-linear attention). bench/plan_accuracy.py compares predicted and measured peaks.
"""

from __future__ import annotations

from soup.device import Device
from soup.plan.decoder import Shape, adapted
from soup.plan.unpadded import of_answers, own_kernels, without_padding
from soup.schema import Config
from soup.specs import DistributedSpec

RUNTIME_BYTES = {"cpu": 720e6, "cuda": 1.5e9}  # the process with its libraries (measured); CUDA's context
BITSANDBYTES = 75e6  # the library and what it imports, where a setting needs it (soup.train.spared)
ALLOCATOR = 1.1  # freed blocks that malloc keeps: measured activations over the tensors counted below
# What glibc's malloc keeps as holes between activations that stay, as a share of those, and with checkpointing of those
# that it frees (measured; giving it back to the system at once costs six times the step's time). A GPU's allocator
# reuses them.
HOLES = {"cpu": 0.4, "cuda": 0.0}
RECOMPUTED_HOLES = {"cpu": 0.55, "cuda": 0.0}
ROUNDED_HOLES = {"cpu": 1.4, "cuda": 0.0}  # of simulated weights: float32 copies came and went between them
LOGIT_CHUNK = (
    256  # learnt tokens that TRL turns into logits at once (sft_trainer._CHUNKED_LM_HEAD_CHUNK_SIZE)
)
DOUBLE = 100e6  # log-probabilities in float64, some tokens at a time, before the first step
LARGE = 2**31  # bytes of float32 weights above which that is done in training's own precision
LOSS_TOKENS = 2048  # of a batch whose loss is measured for the curriculum, padding included
LOGIT_COPIES = 6  # logits, log-softmax, their exponent and product, and two gradients, in float32
STOCK_COPIES = 5  # of all tokens' logits, where TRL's own loss takes them whole (measured: dpo 5.5, orpo 4.3)
NF4_BYTES = 0.516  # a weight and its share of doubly quantized scales (arXiv:2305.14314, section 3)
SIMULATED_COPIES = 6  # of the largest layer's weight in float32, while it is rounded
SHARDED = ("weights", "gradients", "optimizer")  # what several processes can have shares of
ZERO_BUCKET = 50_000_000  # gradients that ZeRO sums at a time
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def peak(
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
    batch_tokens = training.batch_size * task.learnt_from * length / ring
    one_layer = _layer_floats(config, decoder) * products
    if config.lora.use_dora:  # the frozen layer's output and the adapter's, each scaled by a magnitude
        one_layer += (
            2 * sum(outputs for name, _, outputs, _ in decoder.linears if adapted(config, name)) * products
        )
    if training.gradient_checkpointing:
        holes = RECOMPUTED_HOLES[device.kind] * decoder.layers * one_layer
        activations = batch_tokens * (decoder.layers * decoder.hidden * products + one_layer + holes)
        how = "each layer's input, and one layer recomputed" + (", and malloc's holes" if holes else "")
    else:
        # Below the lowest adapter nothing needs a gradient.
        kept = decoder.layers - (training.frozen(decoder.layers) if config.lora.r is not None else 0)
        activations = batch_tokens * kept * one_layer * (1 + HOLES[device.kind])
        how = "what backward needs of every layer" + (
            " above the frozen ones" if kept < decoder.layers else ""
        )
    if ring > 1:
        activations += ring_bytes(decoder, batch_tokens, products) / ALLOCATOR
        how += "; what goes round the ring of one layer"
    if config.model.quantization_aware:
        activations += _simulated_weights(config, decoder, products * (1 + ROUNDED_HOLES[device.kind]))
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
        if own_kernels(
            config
        ):  # the gradient takes the logits' place; a head that trains has its own beside it
            head = decoder.vocab * decoder.hidden
            logits = min(LOGIT_CHUNK, batch_tokens) * decoder.vocab * products
            logits += (
                head * (2 * 4 + products) if config.lora.r is None else head * products * (products != size)
            )
            how_logits += ", with their gradient in their place"
    elif of_answers(config) and decoder.experts == 1:
        logits = min(LOGIT_CHUNK, batch_tokens) * decoder.vocab * products
        logits += decoder.vocab * decoder.hidden * (4 + products if config.lora.r is None else products)
        how_logits = f"{LOGIT_CHUNK} tokens of answers at a time, with their gradient in their place"
    else:
        outputs = 1 if task.head == "score" else decoder.vocab
        logits = training.batch_size * task.forwards * length * outputs * 4 * STOCK_COPIES
        how_logits = "every token of the batch"
    if task.trained_models:  # those of all answers of a step, and a padded copy (TRL's batch_generation)
        rollouts = training.batch_size * training.gradient_accumulation_steps * task.generates
        logits = max(logits, rollouts * decoder.vocab * 4 * 2)
        how_logits += ", or twice those of every generated token of a step, whichever is more"
    if training.curriculum and training.curriculum_metric == "loss":
        whole = max(LOSS_TOKENS, longest) * decoder.vocab * size + longest * decoder.vocab * 8
        if whole > logits:
            logits, how_logits = whole, "every token, while the base model's loss is measured"
    shared = _share(spread)
    gradients = train_size * trainable + task.trained_models * 4 * decoder.total
    parts = {
        "weights": weights * shared["weights"],
        **{name: held * shared["weights"] for name, held in beside.items() if held},
        "gradients": gradients * shared["gradients"],
        "optimizer": optimizer_bytes(config, decoder, trainable + task.trained_models * decoder.total)
        * shared["optimizer"],
        **_of_spreading(
            spread, decoder, device.kind, weights=weights, gradients=gradients, trainable=trainable
        ),
        "activations": ALLOCATOR * activations,
        "logits": logits,
        "runtime": RUNTIME_BYTES[device.kind] + BITSANDBYTES * ("bitsandbytes" in config.distributions()),
    }
    note = f"batch of {training.batch_size} x {length} tokens; activations: {how}; logits: {how_logits}"
    return parts, note


def proving(config: Config, decoder: Shape, device: Device, dtype: str, longest: int, adapters: int) -> float:
    """Bytes that proving the loss takes beside the process (soup.effects.undisturbed): all models in float32, and the
    logits of one row. What is frozen gives way to its copy, on a CPU when all of it is copied, since it is one mapped
    file. 0 of models that are measured as they train."""
    if dtype == "float32" or config.model.stored != "none" or 4 * decoder.total > LARGE:
        return 0.0
    size, task = BYTES[dtype], config.task
    models = 1 + task.frozen_models + (task.reference and config.lora.r is None and not task.precompute_ref)
    floats: float = (longest + task.generates) * decoder.vocab
    held = 4 * (models + task.trained_models) * decoder.total + 4 * adapters
    trains = size * decoder.total if config.lora.r is None else 0
    if task.forwards > 1:  # a pair goes backward, too (soup.effects.accumulation)
        floats += task.learnt_from * longest * decoder.layers * _layer_floats(config, decoder)
    mapped = models * size * decoder.total - trains if device.kind == "cpu" else 0
    return held + trains + max(mapped, 4 * floats + DOUBLE)


def _share(spread: DistributedSpec) -> dict[str, float]:
    """What each process holds of weights, gradients and optimizer state, as a share of the whole.

    FSDP2 that keeps gathered weights has its shares of them beside those.
    """
    shares = {name: 1 / spread.world if name in spread.shards else 1.0 for name in SHARDED}
    if spread.spread == "fsdp" and "weights" not in spread.shards:
        shares["weights"] += 1 / spread.world
    return shares


def _of_spreading(
    spread: DistributedSpec, decoder: Shape, kind: str, *, weights: float, gradients: float, trainable: int
) -> dict[str, float]:
    """Bytes that a model takes only because it is spread: buckets in which gradients are summed, ZeRO's copies of what
    trains, in float32, and weights that are gathered for a while.

    ZeRO-3 keeps a number of them; FSDP2 what lies outside the layers, one layer and the next. DeepSpeed sums a flat
    copy of its bucket, of which gloo makes another to scatter it, and copies what ZeRO-3 has gathered out of the
    buffer that it came in (deepspeed.runtime.zero.partition_parameters.AllGatherCoalescedHandle.wait). FSDP2 copies
    what it gathers, then the gradients that it scatters (torch.distributed.fsdp._fully_shard._fsdp_collectives).
    """
    cut = "weights" in spread.shards
    if spread.spread == "ddp":
        return {"buckets": gradients}
    if spread.spread == "deepspeed":
        gathered = min(1.0, ZERO_BUCKET / decoder.total) * weights if cut else 0.0
        copies = 3 if cut and kind == "cpu" else 2
        return {
            "float32 copies": 4 * trainable / spread.world,
            "buckets": copies * min(gradients, 4 * ZERO_BUCKET) + gathered,
            **({"gathered": gathered} if cut else {}),
        }
    if spread.spread == "fsdp":
        layer = (decoder.total - decoder.outside) / decoder.layers
        share = min(1.0, (decoder.outside + 2 * layer) / decoder.total)
        buckets = {"buckets": share * max(weights, gradients)}
        return buckets | ({"gathered": share * weights} if cut else {})
    return {}


def ring_bytes(decoder: Shape, tokens: float, products: int) -> float:
    """What a process of a ring holds of one layer in its backward pass, beside what autograd keeps (soup.model.ring).

    Keys and values that are there and that come, their gradients likewise and those of its queries in float32.
    """
    return tokens * (2 * 2 * decoder.kv * (products + 4) + 4 * decoder.heads)


def _simulated_weights(config: Config, decoder: Shape, products: float) -> float:
    """Rounded weights that backward needs, of one layer where it is recomputed, and the largest one's copies.
    `products`: bytes of each.

    Weights that train also keep a byte each: whether the rounding let their gradient through.
    """
    kept = decoder.linear / (decoder.layers if config.training.gradient_checkpointing else 1)
    largest = max(inputs * outputs for _, inputs, outputs, _ in decoder.linears)
    return kept * (products + (config.lora.r is None)) + SIMULATED_COPIES * 4 * largest


def _layer_floats(config: Config, decoder: Shape) -> float:
    """Numbers that backward needs of one layer, for one token.

    Two norms keep input, normalised and scaled values (6 d); q and k before and after the rotation, v, and k and v
    repeated for grouped queries; the attention's output; gate, up, their activation and product (4 ff), of the few
    experts that a token passes in an MoE model. soup's own kernels repeat nothing (rows without padding), keep a norm's
    input and output (4 d), and of a gated MLP on plain layers gate and up (2 ff).
    """
    own, model, lora = own_kernels(config), config.model, config.lora
    attention = 2 * (decoder.heads + decoder.kv) + decoder.kv + decoder.heads
    repeats = not without_padding(config) and decoder.kv < decoder.heads
    plain = model.stored == "none" and not model.quantization_aware and not lora.use_dora and not lora.dropout
    norms, gates = 4 if own else 6, 2 if own and plain and not config.training.moe_lora else 4
    return norms * decoder.hidden + attention + 2 * decoder.heads * repeats + gates * decoder.ff


def optimizer_bytes(config: Config, decoder: Shape, trainable: int) -> float:
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
