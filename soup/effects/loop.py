"""Length, batch, order of rows, seeds, clipping and the switches of the training loop."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from soup.effects import Effect, as_it_was, same
from soup.effects.optimizer import max_steps, optimizer
from soup.effects.sources import first_batch, in_order, is_stream


def length(built: Any) -> Iterator[Effect]:
    """Optimizer steps by the trainer's own arithmetic, against rows, batch and epochs."""
    training = built.config.training
    trainer = built.trainer
    steps = max_steps(trainer)
    if is_stream(trainer.train_dataset):
        yield same("training.max_steps", training.max_steps, steps, "steps of the schedule")
        yield Effect(
            "training.epochs", training.epochs, None, True, "training.max_steps wins; a stream has no length"
        )
        return
    task, width = built.config.task, training.batch_size * built.config.replicas
    sequences = len(trainer.train_dataset) * task.samples
    per_epoch = max(1, math.ceil(math.ceil(sequences / width) / training.gradient_accumulation_steps))
    if task.drop_last:
        per_epoch = sequences // (width * training.gradient_accumulation_steps)
    if training.max_steps is not None:
        yield same("training.max_steps", training.max_steps, steps, "steps of the schedule")
        yield Effect("training.epochs", training.epochs, steps / per_epoch, True, "training.max_steps wins")
        return
    expected = -(-training.epochs * per_epoch // 1)
    yield Effect("training.max_steps", None, None, trainer.args.max_steps <= 0, "the epochs decide")
    how = f"{steps} steps, {per_epoch} an epoch"
    yield Effect("training.epochs", training.epochs, steps / per_epoch, steps == expected, how)


def batch(built: Any) -> Iterator[Effect]:
    """Rows of the batches that the training data loader will give, and micro-steps between optimizer steps."""
    trainer = built.trainer
    training = built.config.training
    if is_stream(trainer.train_dataset):
        rows, wanted = len(first_batch(built)), training.batch_size
    else:
        first = next(iter(_own_batches(built)))
        steps = training.gradient_accumulation_steps if built.config.task.generates else 1
        rows = (
            len(first) // steps
        )  # where answers are generated, the loader gives all prompts of a step at once
        wanted = min(training.batch_size, len(trainer.train_dataset) * built.config.task.samples)
        if built.config.replicas > 1:  # the first rows again, where there are too few
            wanted = training.batch_size
    key = "training.batch_size"
    yield Effect(key, training.batch_size, rows, rows == wanted, "rows of the loader's first batch")
    accelerator = trainer.accelerator.gradient_accumulation_steps
    steps = trainer.args.gradient_accumulation_steps
    key = "training.gradient_accumulation_steps"
    yield same(key, training.gradient_accumulation_steps, steps, "the loop's micro-steps between updates")
    if accelerator not in (1, steps):  # the loop counts itself; accelerate must not count once more
        yield Effect(key, steps, steps * accelerator, False, "accelerate accumulates as well")


def clipping(built: Any) -> Iterator[Effect]:
    """Scales a known gradient of two tensors through the trainer's own clipping: its norm afterwards."""
    import torch

    trainer = built.trainer
    wanted = built.config.training.max_grad_norm
    key = "training.max_grad_norm"
    if wanted == 0:
        yield same(key, 0, trainer.args.max_grad_norm, "the loop clips above 0 only")
        return
    trained = [p for p in built.model.parameters() if p.requires_grad]
    probes = trained[:1] + trained[1:][-1:]  # two of one size: a norm for each would let more pass
    size = min(max(2 * wanted, 1.0), 1e12)  # torch adds 1e-6 to the norm, and float32 squares it
    for probe in probes:
        probe.grad = torch.full_like(probe, size * (len(probes) * probe.numel()) ** -0.5)
    trainer._clip_grad_norm(built.model)
    norm = math.hypot(*(float(probe.grad.norm()) for probe in probes))
    for probe in probes:
        probe.grad = None
    ok = abs(norm - min(wanted, size)) <= 1e-2 * min(wanted, size)
    yield Effect(key, wanted, round(norm, 9), ok, f"norm of a gradient of norm {size:g}, after clipping")


def seed(built: Any) -> Iterator[Effect]:
    """The seed of the process when the trainer was built, and what the adapters were initialised from.

    Adapters draw before the trainer sets its seed, so the first one is drawn again and compared.
    """
    import torch

    from soup.train import ranks

    wanted = built.config.training.seed
    how = "the seed that torch's generator started from"
    effective: Any = torch.initial_seed()
    if built.config.task.generates:  # each process answers with a seed of its own
        effective -= ranks.rank()
    adapted = (m for m in built.model.modules() if getattr(m, "lora_A", None))
    layer = next((m for m in adapted if not hasattr(m, "parameter_name")), None)  # experts are drawn last
    if layer is not None and effective == wanted:
        again = _drawn_again(built, layer)
        how += "; the first adapter is what it gives"
        if again is not None and not torch.equal(layer.lora_A["default"].weight, again):
            effective, how = "another", "the first adapter was drawn from another state of the generator"
    yield same("training.seed", wanted, effective, how)


def _drawn_again(built: Any, layer: Any) -> Any:
    """A of the model's first adapter, as PEFT initialises it right after the seed is set."""
    import torch
    from peft import inject_adapter_in_model

    if "default" not in layer.lora_A:
        return None
    alone = torch.nn.Module()
    alone.only = deepcopy(layer.base_layer)
    config = deepcopy(built.model.peft_config["default"])
    config.target_modules, config.layers_to_transform, config.exclude_modules = ["only"], None, None
    config.rank_pattern, config.alpha_pattern, config.target_parameters = {}, {}, None
    config.use_dora = False  # its magnitudes are no part of A, and need the weight's scales
    cuda = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(built.config.training.seed)
        inject_adapter_in_model(config, alone)
    live = layer.lora_A["default"].weight
    return alone.only.lora_A["default"].weight.to(live.device, live.dtype)


def data_order(built: Any) -> Iterator[Effect]:
    """The rows that the sampler will draw first, against torch's permutation from the seed.

    Where rows are taken as they lie (KTO), the rows themselves must be in that order.
    """
    import torch

    from soup.effects.curriculum import buckets

    training = built.config.training
    requested = built.config.tree["training"]["data_seed"]
    if is_stream(built.trainer.train_dataset):
        ok, count = in_order(built)
        how = f"the stream's first {count} rows, and the loader's first batch, are what `datasets` draws by the seed"
        yield Effect("training.data_seed", requested, training.data_seed if ok else "another order", ok, how)
        return
    drawn = list(itertools.islice(itertools.chain.from_iterable(_batches(built)), 32))
    if built.config.task.samples > 1:
        drawn = list(dict.fromkeys(drawn))
    rows = len(built.trainer.train_dataset)
    generator = torch.Generator()
    generator.manual_seed(training.data_seed)
    if training.curriculum:
        expected = []
        for part in buckets(built) or ():
            bucket = torch.tensor(part, dtype=torch.long)
            expected += bucket[torch.randperm(len(bucket), generator=generator)].tolist()
        expected = expected[: len(drawn)]
    else:
        expected = torch.randperm(rows, generator=generator).tolist()[: len(drawn)]
    if built.trainer.args.train_sampling_strategy == "sequential":
        prepared = built.prepared["train"].first(rows)
        held = built.trainer.train_dataset.select_columns(list(prepared[0]))
        drawn = [
            there if held[here] == prepared[there] else -1
            for here, there in zip(drawn, expected, strict=True)
        ]
    how = f"the sampler draws rows {drawn[:6]} first"
    effective = training.data_seed if drawn == expected else f"another order, {drawn[:6]}"
    yield Effect("training.data_seed", requested, effective, drawn == expected, how)


def intervals(built: Any) -> Iterator[Effect]:
    """Steps between logs, checkpoints and evaluations, as the trainer's own flow callback decides them."""
    from transformers import DefaultFlowCallback
    from transformers.trainer_callback import TrainerControl, TrainerState

    trainer = built.trainer
    training = built.config.training
    flow = next(c for c in trainer.callback_handler.callbacks if isinstance(c, DefaultFlowCallback))
    steps = max_steps(trainer)
    state = TrainerState()
    state.compute_steps(trainer.args, steps)
    state.max_steps = steps + 1  # at its last step the loop acts in any case
    for what, switch in (("logging", "should_log"), ("save", "should_save"), ("eval", "should_evaluate")):
        key = f"training.{what}_steps"
        wanted = getattr(training, f"{what}_steps")
        if what == "eval" and trainer.eval_dataset is None:
            yield Effect(
                key, wanted, None, trainer.args.eval_strategy == "no", "there are no rows to evaluate"
            )
            continue
        first = None
        for state.global_step in range(1, min(wanted, steps) + 1):
            if getattr(flow.on_step_end(trainer.args, state, TrainerControl()), switch):
                first = state.global_step
                break
        how = f"the first of {steps} steps at which the loop's flow control acts"
        yield Effect(key, wanted, first, first == (wanted if wanted <= steps else None), how)


def gradient_checkpointing(built: Any) -> Iterator[Effect]:
    """How often each layer's forward runs for one backward: twice where it is recomputed."""
    key = "training.gradient_checkpointing"
    wanted = built.config.training.gradient_checkpointing
    try:
        runs = _recomputing(built)
    except Exception as error:  # noqa: BLE001, a model that cannot run is refused as well
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        yield Effect(key, wanted, "no forward and backward pass", False, why)
        return
    twice = sum(count == 2 for count in runs)
    effective = twice > 0 if twice in (0, len(runs)) else f"on {twice} of {len(runs)}"
    how = f"{twice} of {len(runs)} layers ran once more for the backward pass of a short row"
    yield same(key, wanted, effective, how)


def _recomputing(built: Any) -> list[int]:
    """Forward runs of the layers, with the switches as `transformers` sets them when training begins."""
    trainer, model = built.trainer, built.model
    before = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    # No other module's: transformers adds the hooks that read routers at its first pass, and only then.
    embedding = model.get_input_embeddings()
    kept = set(embedding._forward_hooks)
    if trainer.args.gradient_checkpointing and not before:
        model.gradient_checkpointing_enable(dict(trainer.args.gradient_checkpointing_kwargs or {}))
    try:
        return _forwards(built)
    finally:
        if trainer.args.gradient_checkpointing and not before:
            model.gradient_checkpointing_disable()
        for added in set(embedding._forward_hooks) - kept:  # for gradients of its output
            del embedding._forward_hooks[added]


def _forwards(built: Any) -> list[int]:
    """Forward runs of each layer that could be recomputed, in one forward and backward pass of a few tokens."""
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    model = built.model
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    counts = dict.fromkeys(layers, 0)

    def count(module: Any, *_: Any) -> None:
        counts[module] += 1

    handles = [layer.register_forward_pre_hook(count) for layer in layers]
    ids_1T = torch.arange(8, device=built.trainer.args.device)[None]
    try:
        with as_it_was(model), built.trainer.accelerator.autocast():
            model.train()
            model(input_ids=ids_1T, use_cache=False).logits.float().mean().backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in model.parameters():
            parameter.grad = None
    return [count for count in counts.values() if count]


def processes(built: Any) -> Iterator[Effect]:
    """Processes that accelerate sees, and which of them one agent of torchrun started: that is a node's."""
    from soup.train import ranks

    distributed = built.config.distributed
    agents = ranks.gather(os.environ.get("GROUP_RANK", "0"))
    world = built.trainer.accelerator.num_processes
    each = max(map(agents.count, agents)) if len(agents) == world else world
    yield same("distributed.processes", distributed.processes, each, "that accelerate sees, of one agent")
    yield same("distributed.nodes", distributed.nodes, len(set(agents)), "agents of all processes")


def device(built: Any) -> Iterator[Effect]:
    """Where the model's parameters and the trainer's batches lie."""
    asked = built.config.launch.device
    found = {p.device.type for p in built.model.parameters()} | {built.trainer.args.device.type}
    kinds = " and ".join(sorted(found))
    ok = found == {built.device.kind if asked == "auto" else asked}
    yield Effect("launch.device", asked, kinds, ok, f"parameters and batches; {built.device.reason}")


def neftune(built: Any) -> Iterator[Effect]:
    """The noise on the embedding of a few tokens, in the passes that learn, and in those that do not."""
    import torch

    model, wanted = built.model, built.config.training.neftune_alpha
    embedding = model.get_input_embeddings()
    ids_1T = torch.arange(16, device=embedding.weight.device)[None]
    found, drawn = {}, []
    with as_it_was(model):
        torch.manual_seed(0)
        for training, grad in ((True, True), (True, True), (True, False), (False, True)):
            embedding.train(training)
            with torch.set_grad_enabled(grad):
                clean_1TD = embedding.forward(ids_1T)  # without hooks
                noise_1TD = (embedding(ids_1T) - clean_1TD).detach().float()
            found[training, grad] = float(noise_1TD.abs().max()) * noise_1TD[0].numel() ** 0.5
            drawn.append(noise_1TD)
        alike = torch.equal(drawn[0], drawn[1]) or _alike(built, embedding, ids_1T)
    learns = found.pop((True, True))
    quiet = not any(found.values())
    if built.trainer.neftune_noise_alpha:  # transformers' own, which begins with the training
        learns += built.trainer.neftune_noise_alpha
    rounding = torch.finfo(embedding.weight.dtype).eps * float(clean_1TD.detach().abs().max())
    above = wanted * 1.01 + rounding * (16 * embedding.weight.shape[1]) ** 0.5
    ok = quiet and (not alike and 0.9 * wanted <= learns <= above if wanted else learns == 0)
    how = f"largest noise x sqrt(L d) is {learns:.4g} where it learns, {max(found.values()):.4g} elsewhere"
    if wanted:
        how += f"; two passes of the model are {'alike' if alike else 'not alike'}"
    yield Effect("training.neftune_alpha", wanted, wanted if ok else round(learns, 4), ok, how)


def _alike(built: Any, embedding: Any, ids_1T: Any) -> bool:
    """Whether two passes of the model give the same, though its embedding, and no other module, is training."""
    model = built.model
    if not built.config.training.neftune_alpha:
        return True
    model.eval()
    embedding.train()
    with built.trainer.accelerator.autocast():
        one, other = (model(input_ids=ids_1T, use_cache=False).logits.detach() for _ in range(2))
    return bool((one == other).all())


def freezing(built: Any) -> Iterator[Effect]:
    """Bottom layers in which nothing trains and no adapter lies; above them all weights, or all adapters, train."""
    from soup.model.freeze import stack

    training = built.config.training
    stepped = {id(p) for group in optimizer(built).param_groups for p in group["params"]}
    layers = stack(built.model)[1]
    trains = [any(p.requires_grad or id(p) in stepped for p in layer.parameters()) for layer in layers]
    adapted = [any("lora_" in name for name, _ in layer.named_parameters()) for layer in layers]
    asked = training.frozen(len(layers))
    above = trains[asked:]
    if built.config.lora.r is not None:  # named modules may lie in some of the layers only
        above = [on for on, adapters in zip(above, adapted[asked:], strict=True) if adapters]
    ok = not any(trains[:asked]) and not any(adapted[:asked]) and all(above)
    frozen = asked if ok else trains.count(False)
    how = f"{trains.count(False)} of {len(trains)} layers have nothing that trains, {adapted.count(True)} have adapters"
    for key, wanted, effective in (
        ("freeze_layers", training.freeze_layers, frozen),
        ("freeze_ratio", training.freeze_ratio, frozen / len(trains)),
    ):
        yield Effect(f"training.{key}", wanted, wanted if ok and not wanted else effective, ok, how)


def _batches(built: Any) -> Iterator[list[int]]:
    """Row numbers of the batches of the first epoch, by all processes together: each batch is the first one's part,
    then the second's, and so on; a ring counts once. Without the rows of the beginning by which accelerate fills the
    last batches up, so that all processes have as many. From a copy of the sampler: the real one stays unread."""
    from soup.train import ranks

    readers = ranks.gather(list(_own_batches(built)))
    fills = len(readers) > 1 and built.config.task.samples == 1
    left = len(built.trainer.train_dataset) if fills else None
    for parts in zip(*readers[:: len(readers) // built.config.replicas], strict=True):
        batch = [row for part in parts for row in part][:left]
        yield batch
        left = None if left is None else left - len(batch)


def _own_batches(built: Any) -> Iterator[list[int]]:
    """Those of this process."""
    import torch

    state = torch.get_rng_state()
    try:
        sampler = deepcopy(built.trainer.get_train_dataloader().batch_sampler)
        yield from (list(rows) for rows in sampler)
    finally:
        torch.set_rng_state(state)
