"""Learning rates, schedule and optimizer settings, read from the optimizer and scheduler that will step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from soup.effects import Effect, same


def groups(built: Any) -> Iterator[Effect]:
    """Peak rate and weight decay of every parameter group, and that the groups hold just what trains."""
    optimizer = _optimizer(built)
    optim = built.config.optim
    rates = sorted({group["initial_lr"] for group in optimizer.param_groups})
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trains = {id(p) for p in built.model.parameters() if p.requires_grad}
    how = f"initial_lr of {len(optimizer.param_groups)} parameter groups, which hold {len(held)} tensors"
    effect = same("optim.lr", optim.lr, rates[0] if len(rates) == 1 else rates, how)
    if held != trains:
        how = f"the optimizer holds {len(held)} tensors, and {len(trains)} have requires_grad"
        effect = Effect(effect.key, effect.requested, effect.effective, False, how)
    yield effect
    # biases and norms are exempt from decay in transformers: that is the group with 0
    decays = sorted({group["weight_decay"] for group in optimizer.param_groups if group["params"]})
    effective: Any = max(decays)
    yield same("optim.weight_decay", optim.weight_decay, effective, f"weight_decay of the groups: {decays}")


def adam_settings(built: Any) -> Iterator[Effect]:
    """AdamW's betas and epsilon, as the groups hold them."""
    optimizer = _optimizer(built)
    tree = built.config.tree["optim"]
    first = optimizer.param_groups[0]
    how = f"param_groups of {type(optimizer).__name__}"
    yield same("optim.beta1", float(tree["beta1"]), first["betas"][0], how)
    yield same("optim.beta2", float(tree["beta2"]), first["betas"][1], how)
    yield same("optim.eps", float(tree["eps"]), first["eps"], how)


def schedule(built: Any) -> Iterator[Effect]:
    """The schedule's factor at 9 steps over the run, against the formula."""
    trainer = built.trainer
    _optimizer(built)
    steps = max_steps(trainer)
    optim = built.config.optim
    warmup = math.ceil(steps * optim.warmup_ratio)
    expected = _formula(optim.scheduler, warmup, steps)
    factor = trainer.lr_scheduler.lr_lambdas[0]
    sampled = sorted({round(steps * part / 8) for part in range(9)})
    live = [factor(step) for step in sampled]
    right = all(math.isclose(a, expected(s), abs_tol=1e-9) for a, s in zip(live, sampled, strict=True))
    rounded = [round(one, 4) for one in live]
    how = f"factor at steps {sampled}: {rounded}"
    name = optim.scheduler
    yield Effect("optim.scheduler", name, name if right else rounded, right, how)
    reached = next((step for step in range(steps + 1) if factor(step) >= 1 - 1e-12), None)
    yield Effect(
        "optim.warmup_ratio",
        optim.warmup_ratio,
        None if reached is None else reached / steps,
        reached == warmup or (warmup == steps and reached is None),
        f"the rate peaks at step {reached} of {steps}",
    )


def max_steps(trainer: Any) -> int:
    """Optimizer steps that the trainer will take, by its own arithmetic."""
    return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


def _optimizer(built: Any) -> Any:
    """The optimizer that will step, made now if it is not there yet; training takes it over as it is."""
    trainer = built.trainer
    if trainer.optimizer is None or trainer.lr_scheduler is None:
        trainer.create_optimizer_and_scheduler(max_steps(trainer))
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def _formula(name: str, warmup: int, steps: int) -> Callable[[int], float]:
    """Linear warm-up, then the named decay to 0 at the last step."""

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        done = (step - warmup) / max(1, steps - warmup)
        if name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1.0 if name == "constant" else 1 - done

    return factor
