"""Length, batch, order of rows, seeds, clipping and the switches of the training loop."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from soup.effects import Effect, same
from soup.effects.optimizer import max_steps


def length(built: Any) -> Iterator[Effect]:
    """Optimizer steps by the trainer's own arithmetic, against rows, batch and epochs."""
    training = built.config.training
    trainer = built.trainer
    steps = max_steps(trainer)
    micro = -(-len(trainer.train_dataset) // (training.batch_size * built.config.distributed.world))
    per_epoch = max(1, -(-micro // training.gradient_accumulation_steps))
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
    first = next(iter(_batches(built)))
    rows = len(first)
    wanted = min(training.batch_size, len(trainer.train_dataset))
    key = "training.batch_size"
    yield Effect(key, training.batch_size, rows, rows == wanted, "rows of the loader's first batch")
    accelerator = trainer.accelerator.gradient_accumulation_steps
    steps = trainer.args.gradient_accumulation_steps
    key = "training.gradient_accumulation_steps"
    yield same(key, training.gradient_accumulation_steps, steps, "the loop's micro-steps between updates")
    if accelerator not in (1, steps):  # the loop counts itself; accelerate must not count once more
        yield Effect(key, steps, steps * accelerator, False, "accelerate accumulates as well")


def clipping(built: Any) -> Iterator[Effect]:
    """Scales a known gradient through the trainer's own clipping: its norm afterwards."""
    import torch

    trainer = built.trainer
    wanted = built.config.training.max_grad_norm
    key = "training.max_grad_norm"
    if wanted == 0:
        yield same(key, 0, trainer.args.max_grad_norm, "the loop clips above 0 only")
        return
    probe = next(p for p in built.model.parameters() if p.requires_grad)
    probe.grad = torch.full_like(probe, 2 * wanted * probe.numel() ** -0.5)
    trainer._clip_grad_norm(built.model)
    norm = float(probe.grad.norm())
    probe.grad = None
    ok = abs(norm - wanted) <= 1e-2 * wanted
    yield Effect(key, wanted, round(norm, 6), ok, "norm of a gradient of twice that, after clipping")


def seed(built: Any) -> Iterator[Effect]:
    """The seed of the process when the trainer was built."""
    import torch

    how = "the seed that torch's generator started from"
    yield same("training.seed", built.config.training.seed, torch.initial_seed(), how)


def data_order(built: Any) -> Iterator[Effect]:
    """The rows that the sampler will draw first, against torch's permutation from the seed."""
    import torch

    training = built.config.training
    drawn = list(itertools.islice(itertools.chain.from_iterable(_batches(built)), 32))
    rows = len(built.trainer.train_dataset)
    generator = torch.Generator()
    generator.manual_seed(training.data_seed)
    expected = torch.randperm(rows, generator=generator).tolist()[: len(drawn)]
    how = f"the sampler draws rows {drawn[:6]} first"
    requested = built.config.tree["training"]["data_seed"]
    effective = training.data_seed if drawn == expected else f"another order, {drawn[:6]}"
    yield Effect("training.data_seed", requested, effective, drawn == expected, how)


def intervals(built: Any) -> Iterator[Effect]:
    """Steps between logs, checkpoints and evaluations, as the trainer's own flow callback decides them."""
    from transformers import DefaultFlowCallback
    from transformers.trainer_callback import TrainerControl, TrainerState

    trainer = built.trainer
    training = built.config.training
    flow = next(c for c in trainer.callback_handler.callbacks if isinstance(c, DefaultFlowCallback))
    state = TrainerState()
    state.compute_steps(trainer.args, 10**9)
    state.max_steps = 10**9
    for what, switch in (("logging", "should_log"), ("save", "should_save"), ("eval", "should_evaluate")):
        key = f"training.{what}_steps"
        wanted = getattr(training, f"{what}_steps")
        if what == "eval" and trainer.eval_dataset is None:
            yield Effect(
                key, wanted, None, trainer.args.eval_strategy == "no", "there are no rows to evaluate"
            )
            continue
        first = None
        for step in (max(1, wanted - 1), wanted):
            state.global_step = step
            if getattr(flow.on_step_end(trainer.args, state, TrainerControl()), switch):
                first = step
                break
        yield same(key, wanted, first, "the first step at which the loop's flow control acts")


def gradient_checkpointing(built: Any) -> Iterator[Effect]:
    """The layers' own switches; `transformers` turns them on when training begins, so the arguments count too."""
    trainer = built.trainer
    wanted = built.config.training.gradient_checkpointing
    layers = [m for m in built.model.modules() if hasattr(m, "gradient_checkpointing")]
    if wanted and trainer.args.gradient_checkpointing:
        built.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    on = sum(bool(m.gradient_checkpointing) for m in layers)
    how = f"{on} of {len(layers)} modules that can recompute will"
    yield same("training.gradient_checkpointing", wanted, on > 0, how)


def processes(built: Any) -> Iterator[Effect]:
    """Processes that accelerate sees."""
    distributed = built.config.distributed
    world = built.trainer.accelerator.num_processes
    how = "processes that accelerate sees"
    yield same("distributed.processes", distributed.processes, world // distributed.nodes, how)
    yield same("distributed.nodes", distributed.nodes, world // distributed.processes, how)


def features_off(built: Any) -> Iterator[Effect]:
    """What was not asked for is not there: each feature of the loop that is off, read from the live objects."""
    trainer, model = built.trainer, built.model
    tree = built.config.tree["training"]
    classes = {type(module).__module__ for module in model.modules()}
    callbacks = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    sampler = _sampler(trainer)
    embedding = model.get_input_embeddings()
    noise = len(embedding._forward_hooks) if trainer.neftune_noise_alpha else 0

    def off(key: str, on: bool, how: str) -> Effect:
        value = tree[key]
        return Effect(f"training.{key}", value, value if not on else "on", not on, how)

    packs = bool(getattr(trainer, "padding_free", False))
    yield off("packing", packs, "rows reach the model one document each, padded")
    liger = bool(trainer.args.use_liger_kernel) or any("liger" in name for name in classes)
    yield off("use_liger", liger, "no module comes from liger_kernel")
    attention = getattr(model.config, "_attn_implementation", None)
    flash = "flash" in str(attention)
    reason = "no CUDA device" if built.device.kind == "cpu" else "transformers' choice"
    wanted = tree["use_flash_attn"]
    how = f"attention: {attention}, because {reason}"
    yield Effect("training.use_flash_attn", wanted, attention, wanted != "off" or not flash, how)
    yield off("neftune_alpha", bool(trainer.neftune_noise_alpha or noise), "no noise hook on the embedding")
    experts = [n for n, p in model.named_parameters() if "experts" in n and "lora_" in n]
    yield off("moe_lora", bool(experts), "no adapter parameter on an expert")
    yield off("moe_aux_loss_coeff", False, "the model's own coefficient")
    ordered = type(sampler).__name__ not in ("RandomSampler", "SeedableRandomSampler")
    for key in ("curriculum", "curriculum_metric", "curriculum_buckets"):
        yield off(key, ordered, f"rows are drawn by {type(sampler).__name__}")
    frozen = _frozen_layers(built)
    for key in ("freeze_layers", "freeze_ratio"):
        yield off(key, frozen > 0, f"{frozen} layers have nothing that trains")
    watched = any("Watchdog" in name for name in callbacks)
    for key in (
        "loss_watchdog",
        "loss_watchdog_threshold",
        "loss_watchdog_patience",
        "loss_watchdog_action",
    ):
        yield off(key, watched, f"callbacks: {', '.join(callbacks)}")


def _frozen_layers(built: Any) -> int:
    """Decoder layers without a trained parameter, counted where any other layer of the stack has one."""
    import torch

    stacks = [m for m in built.model.modules() if isinstance(m, torch.nn.ModuleList)]
    frozen = 0
    for stack in stacks:
        trains = [any(p.requires_grad for p in layer.parameters()) for layer in stack]
        frozen += trains.count(False) if any(trains) else 0
    return frozen


def _sampler(trainer: Any) -> Any:
    """The sampler at the bottom of the training loader's batch samplers."""
    sampler = trainer.get_train_dataloader().batch_sampler
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    return getattr(sampler, "sampler", sampler)


def _batches(built: Any) -> Iterator[list[int]]:
    """Row numbers of the batches of the first epoch, from a copy of the sampler: the real one stays unread."""
    import torch

    state = torch.get_rng_state()
    try:
        sampler = deepcopy(built.trainer.get_train_dataloader().batch_sampler)
        yield from (list(rows) for rows in sampler)
    finally:
        torch.set_rng_state(state)
