"""Learning rates, schedule and optimizer settings, read from the optimizer and scheduler that will step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from soup.effects import Effect, same


def groups(built: Any) -> Iterator[Effect]:
    """Peak rate and weight decay of every parameter group, and that the groups hold just what trains."""
    live = optimizer(built)
    optim = built.config.optim
    rates = sorted({group["initial_lr"] for group in live.param_groups})
    held = {id(p) for group in live.param_groups for p in group["params"]}
    model = built.trainer.model
    trains = {id(p) for p in model.parameters() if p.requires_grad}
    how = f"initial_lr of {len(live.param_groups)} parameter groups, which hold {len(held)} tensors"
    effect = same("optim.lr", optim.lr, rates[0] if len(rates) == 1 else rates, how)
    if held != trains:
        how = f"the optimizer holds {len(held)} tensors, and {len(trains)} have requires_grad"
        effect = Effect(effect.key, effect.requested, effect.effective, False, how)
    yield effect
    # biases and norms are exempt from decay in transformers
    decaying = set(built.trainer.get_decay_parameter_names(model))
    should = {id(p): name in decaying for name, p in model.named_parameters()}
    decays: dict[bool, set[float]] = {True: set(), False: {0.0}}
    for group in live.param_groups:
        for parameter in group["params"]:
            decays[should.get(id(parameter), True)].add(group["weight_decay"])
    decayed: Any = sorted(decays[True])
    how = f"weight_decay of the groups: {decayed}, {sorted(decays[False])} for biases and norms"
    one = decayed[0] if len(decayed) == 1 else decayed
    effect = same("optim.weight_decay", optim.weight_decay, one, how)
    yield Effect(effect.key, effect.requested, one, effect.ok and decays[False] == {0.0}, how)


def adam_settings(built: Any) -> Iterator[Effect]:
    """AdamW's betas and epsilon, as every group of an AdamW holds them."""
    import torch

    live = optimizer(built)
    tree = built.config.tree["optim"]
    how = f"param_groups of {type(live).__name__}"
    adamw = isinstance(live, torch.optim.AdamW)
    held = {(*group.get("betas", (None, None)), group.get("eps")) for group in live.param_groups}
    for place, key in enumerate(("beta1", "beta2", "eps")):
        values = sorted({one[place] for one in held}, key=str)
        effect = same(f"optim.{key}", float(tree[key]), values[0] if len(values) == 1 else values, how)
        yield Effect(effect.key, effect.requested, effect.effective, effect.ok and adamw, how)


def schedule(built: Any) -> Iterator[Effect]:
    """The schedule's factor at 9 steps over the run, against the formula."""
    trainer = built.trainer
    optimizer(built)
    steps = max_steps(trainer)
    optim = built.config.optim
    warmup = math.ceil(steps * optim.warmup_ratio)
    expected = _formula(optim.scheduler, warmup, steps)
    factors = getattr(trainer.lr_scheduler, "lr_lambdas", None) or [lambda _step: math.nan]
    factor = factors[0]
    sampled = sorted({round(steps * part / 8) for part in range(9)})
    right = all(math.isclose(one(s), expected(s), abs_tol=1e-9) for one in factors for s in sampled)
    rounded = [round(factor(s), 4) for s in sampled]
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


def optimizer(built: Any) -> Any:
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
        if name == "constant":
            return 1.0
        rest = max(1, steps - warmup)
        if name == "linear":
            return (steps - step) / rest
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / rest))

    return factor
