"""Learning rates, schedule and optimizer settings, read from the optimizer and scheduler that will step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from soup.effects import Effect, same

SIDE = 256  # of the square tensor that is stepped: large enough for bitsandbytes to keep 8-bit state of it
FP32 = 4  # bytes
HALF = 0.03  # of Muon, whose iterations are in bfloat16
LOOKED = 500  # steps in which each one is looked at for another of GaLore's bases
DECAY = 1e-6  # of float32's rounding beside 1
TOLERANCE = 0.02  # mean difference over the mean step; 8-bit moments are off by about a hundredth


def groups(built: Any) -> Iterator[Effect]:
    """Peak rate and weight decay of every parameter group, and that the groups hold just what trains."""
    live = optimizer(built)
    optim = built.config.optim
    rates = sorted({group["initial_lr"] for group in live.param_groups if group["params"]})
    wanted = sorted(
        {optim.lr, optim.lr * (built.config.lora.loraplus_lr_ratio or 1.0)}
    )  # LoRA+: A's, and B's
    right = len(rates) == len(wanted) and all(map(math.isclose, rates, wanted))
    held = {id(p) for group in live.param_groups for p in group["params"]}
    model = built.trainer.model
    trains = {id(p) for p in model.parameters() if p.requires_grad}
    how = f"initial_lr of {len(live.param_groups)} parameter groups, which hold {len(held)} tensors"
    shown = optim.lr if right else rates[0] if len(rates) == 1 else rates
    effect = Effect("optim.lr", optim.lr, shown, right, how)
    if held != trains:
        how = f"the optimizer holds {len(held)} tensors, and {len(trains)} have requires_grad"
        effect = Effect(effect.key, effect.requested, effect.effective, False, how)
    yield effect
    # biases and norms are exempt from decay in transformers
    decaying = set(built.trainer.get_decay_parameter_names(model))
    should = {id(p): name in decaying for name, p in model.named_parameters()}
    decays: dict[bool, set[float]] = {True: set(), False: {0.0}}
    for group in live.param_groups:
        for kind in {should.get(id(parameter), True) for parameter in group["params"]}:
            decays[kind].add(_decay(live, group))
    decayed: Any = sorted(decays[True])
    how = f"what steps without a gradient take from weights: {decayed}, {sorted(decays[False])} from biases and norms"
    one = decayed[0] if len(decayed) == 1 else decayed
    right = decays[False] == {0.0} and all(abs(found - optim.weight_decay) < DECAY for found in decayed)
    shown = optim.weight_decay if right else one
    yield Effect("optim.weight_decay", optim.weight_decay, shown, right, how)


def adam(built: Any) -> Iterator[Effect]:
    """AdamW (arXiv:1711.05101), and its betas and epsilon as every group holds them.

    Adam's first steps are about the gradient's sign, whatever the betas: the second tells them apart.
    """
    tree = built.config.tree["optim"]
    beta1, beta2, eps = (float(tree[key]) for key in ("beta1", "beta2", "eps"))

    proved = _steps(built, _adam(beta1, beta2, eps))
    if tree["name"] == "adamw":
        fused = all(group.get("fused") for group in optimizer(built).param_groups)
        how = f"{proved.how}; {'one fused kernel' if fused else 'no fused kernel'}"
        proved = replace(proved, ok=proved.ok and fused, how=how)
    yield proved
    yield from _held(built, {"beta1": beta1, "beta2": beta2, "eps": eps}, _adam(beta1, beta2, eps))


def _adam(beta1: float, beta2: float, eps: float) -> Callable[[Sequence[Any]], Any]:
    def steps(gradients: Sequence[Any]) -> Any:
        moment = square = moved = 0.0
        for count, gradient in enumerate(gradients, 1):
            moment = beta1 * moment + (1 - beta1) * gradient
            square = beta2 * square + (1 - beta2) * gradient**2
            root = (square / (1 - beta2**count)) ** 0.5
            moved = moved - moment / (1 - beta1**count) / (root + eps)
        return moved

    return steps


def lion(built: Any) -> Iterator[Effect]:
    """Lion (arXiv:2302.06675): the sign of a blend of moment and gradient, and its betas as every group holds them."""
    tree = built.config.tree["optim"]
    beta1, beta2 = float(tree["beta1"]), float(tree["beta2"])

    def steps(gradients: Sequence[Any]) -> Any:
        moment = moved = 0.0
        for gradient in gradients:
            moved = moved - (beta1 * moment + (1 - beta1) * gradient).sign()
            moment = beta2 * moment + (1 - beta2) * gradient
        return moved

    yield _steps(built, steps)
    yield from _held(built, {"beta1": beta1, "beta2": beta2})


def adafactor(built: Any) -> Iterator[Effect]:
    """Adafactor (arXiv:1804.04235, algorithm 4) without a first moment: decay 1 - t^-0.8, clipped at 1."""

    def steps(gradients: Sequence[Any]) -> Any:
        rows = columns = moved = 0.0
        for count, gradient in enumerate(gradients, 1):
            decay, square = 1 - count**-0.8, gradient**2 + 1e-30
            rows = decay * rows + (1 - decay) * square.mean(1, keepdim=True)
            columns = decay * columns + (1 - decay) * square.mean(0, keepdim=True)
            update = gradient / (rows * columns / rows.mean()) ** 0.5
            moved = moved - update / max(1.0, float(update.pow(2).mean() ** 0.5))
        return moved

    yield _steps(built, steps, state_bytes=None)


def schedule_free(built: Any) -> Iterator[Effect]:
    """Schedule-free AdamW (arXiv:2405.15682, algorithm 1) at a constant rate: gradients are taken at
    y = (1 - beta1) z + beta1 x, z steps, and x is the average of all z."""
    tree = built.config.tree["optim"]
    beta1, beta2, eps = (float(tree[key]) for key in ("beta1", "beta2", "eps"))

    def steps(gradients: Sequence[Any]) -> Any:
        square = z = x = 0.0
        for count, gradient in enumerate(gradients, 1):
            square = beta2 * square + (1 - beta2) * gradient**2
            z = z - gradient / ((square / (1 - beta2**count)) ** 0.5 + eps)
            x = x + (z - x) / count
        return (1 - beta1) * z + beta1 * x

    yield _steps(built, steps)
    yield from _held(built, {"beta1": beta1, "beta2": beta2, "eps": eps}, steps)


def galore(built: Any) -> Iterator[Effect]:
    """GaLore (arXiv:2403.03507, algorithm 2) with Adam, and the epsilon of its paper's faster form (arXiv:1412.6980,
    section 2): which weights are projected, to which rank, and two steps."""
    import torch
    from transformers.pytorch_utils import Conv1D

    from soup.model.freeze import stack

    tree = built.config.tree["optim"]
    rank, gap, scale = (tree[f"galore_{name}"] for name in ("rank", "update_proj_gap", "scale"))
    beta1, beta2, eps = (float(tree[key]) for key in ("beta1", "beta2", "eps"))

    def steps(gradients: Sequence[Any]) -> Any:
        moment = square = moved = 0.0
        for count, gradient in enumerate(gradients, 1):
            if (count - 1) % gap == 0:
                # As the library takes it: after another sign or rotation the moment is another.
                basis_Rn = torch.linalg.svd(gradient, full_matrices=False).Vh[:rank]
            low = gradient @ basis_Rn.T
            moment = beta1 * moment + (1 - beta1) * low
            square = beta2 * square + (1 - beta2) * low**2
            rest = 1 - beta2**count
            step = moment / (1 - beta1**count) / ((square / rest) ** 0.5 + eps / rest**0.5)
            moved = moved - scale * step @ basis_Rn
        return moved

    live = optimizer(built)
    yield _steps(built, steps, state_bytes=8 * min(rank, SIDE) / SIDE)
    yield from _held(built, {"beta1": beta1, "beta2": beta2, "eps": eps}, steps)
    held = [(group, p) for group in live.param_groups for p in group["params"]]
    projected = {id(p): group for group, p in held if "rank" in group}
    inside = [m for m in stack(built.model)[1].modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    wanted = {id(m.weight) for m in inside if m.weight.requires_grad}
    kinds = {f"{tuple(p.shape)} to {min(group['rank'], *p.shape)}" for group, p in held if id(p) in projected}
    how = f"{len(projected)} of {len(held)} tensors are projected: {', '.join(sorted(kinds))}"
    right = set(projected) == wanted
    for name, value in (("rank", rank), ("update_proj_gap", gap), ("scale", scale)):
        values = sorted({group.get(name) for group in projected.values()})
        if (
            name == "update_proj_gap"
        ):  # not what groups say of it: when the library's projector takes another basis
            values = sorted({_projected_for(built, group) for group in projected.values()}, key=str)
        ok = right and values == [value]
        yield Effect(f"optim.galore_{name}", value, values[0] if len(values) == 1 else values, ok, how)


def muon(built: Any) -> Iterator[Effect]:
    """Muon (Jordan 2024) with the update's size of arXiv:2502.16982, which tensors it has, and AdamW for the others."""
    import torch
    from transformers.pytorch_utils import Conv1D

    from soup.model.freeze import stack

    tree = built.config.tree["optim"]
    momentum, nesterov, count = (tree[name] for name in ("momentum", "nesterov", "ns_steps"))

    def steps(gradients: Sequence[Any]) -> Any:
        moment = moved = 0.0
        for gradient in gradients:
            moment = momentum * moment + gradient
            X = (gradient + momentum * moment if nesterov else moment).double()
            X = X / X.norm()
            for _ in range(count):
                A = X @ X.T
                X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
            moved = moved - 0.2 * max(X.shape) ** 0.5 * X.float()
        return moved

    live = optimizer(built)
    muons, others = ([g for g in live.param_groups if ("momentum" in g) is one] for one in (True, False))
    proved = [_steps(built, steps, group=group, tolerance=HALF) for group in muons]
    adams = [_steps(built, _adam(0.9, 0.999, 1e-8), 2 * FP32, group=group) for group in others]
    held = {id(p) for group in muons for p in group["params"]}
    trains = {id(p): (name, p) for name, p in built.trainer.model.named_parameters() if p.requires_grad}
    inside = [m for m in stack(built.model)[1].modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    wanted = {id(m.weight) for m in inside} & set(trains) | {
        number for number, (name, p) in trains.items() if "lora_" in name and p.ndim == 2
    }
    how = (
        f"{len(held)} matrices of {len(trains)} tensors are Muon's, {proved[0].how if proved else 'no step'}"
    )
    if adams:
        how += f"; the others AdamW's, {adams[0].how}"
    ok = held == wanted and bool(proved) and all(one.ok for one in (*proved, *adams))
    name = tree["name"]
    yield Effect("optim.name", name, name if ok else "another, or of other tensors", ok, how)
    for key in ("momentum", "nesterov", "ns_steps"):
        values = sorted({group.get(key) for group in muons})
        how = f"groups of {type(live).__name__} that hold matrices"
        yield same(f"optim.{key}", tree[key], values[0] if len(values) == 1 else values, how)


def _steps(
    built: Any,
    formula: Callable[[Sequence[Any]], Any],
    state_bytes: float | None = math.nan,
    *,
    group: Mapping[str, Any] | None = None,
    tolerance: float = TOLERANCE,
) -> Effect:
    """Two steps at a rate of 1 of a tensor beside the model's, by a twin of the live optimizer, against `formula`.

    `group`: the one whose settings it takes, the first if not given. `formula` is given the gradients (SIDE, SIDE), of
    full rank, and says where a tensor of zeros ends. `state_bytes`: what the state must take for each parameter, as
    the plan counts it if not given; `None` where it depends on the tensor's sides.
    """
    import torch

    live, spec = optimizer(built), built.config.optim
    device = live.param_groups[0]["params"][0].device
    moved = torch.nn.Parameter(torch.zeros(SIDE, SIDE, device=device))
    first = live.param_groups[0] if group is None else group
    twin = _twin(live, first | {"params": [moved], "lr": 1.0, "weight_decay": 0.0})
    places = torch.arange(SIDE * SIDE, device=device, dtype=torch.float64).reshape(SIDE, SIDE)
    gradients = [torch.sin(places**2).float(), torch.sin(places**2 + places).float()]
    for gradient in gradients:
        moved.grad = gradient.clone()
        type(live).step(twin)
    expected = formula(gradients)
    off = float((moved.detach() - expected).abs().mean() / expected.abs().mean())
    held = [one for one in twin.state[moved].values() if torch.is_tensor(one)]
    state = sum(one.numel() * one.element_size() for one in held) / moved.numel()
    counted = spec.state_bytes if state_bytes is not None and math.isnan(state_bytes) else state_bytes
    ok = off <= tolerance and (counted is None or abs(state - counted) <= 0.1 * counted)
    name = built.config.tree["optim"]["name"]
    how = f"two steps by {type(live).__name__} are {off:.1e} off the formula; its state: {state:.3g} bytes a parameter"
    return Effect("optim.name", name, name if ok else f"another, {type(live).__name__}", ok, how)


def _twin(live: Any, group: dict[str, Any]) -> Any:
    """The live optimizer once more, with no state and this one group, which it trains."""
    twin = object.__new__(type(live))
    twin.__dict__.update(
        {name: value for name, value in vars(live).items() if name != "step"}
    )  # the schedule's
    twin.state = defaultdict(dict)
    twin.param_groups = [group | ({"train_mode": True} if "train_mode" in group else {})]
    return twin


def _decay(live: Any, group: dict[str, Any]) -> float:
    """What a twin's step takes from ones at a rate of 1 where the gradient is zero: every optimizer's decay."""
    import torch

    ones = torch.nn.Parameter(torch.ones(SIDE, SIDE, device=group["params"][0].device))
    ones.grad = torch.zeros_like(ones)
    type(live).step(_twin(live, group | {"params": [ones], "lr": 1.0}))
    return round(float((1 - ones.detach().double()).mean()), 7)


def _damped(live: Any, formula: Callable[[Sequence[Any]], Any], size: float) -> bool:
    """Whether a first step on a gradient of that size everywhere, about epsilon, is as far as the formula says."""
    import torch

    group = live.param_groups[0]
    moved = torch.nn.Parameter(torch.zeros(SIDE, SIDE, device=group["params"][0].device))
    gradient = torch.full_like(moved, size)
    moved.grad = gradient.clone()
    type(live).step(_twin(live, group | {"params": [moved], "lr": 1.0, "weight_decay": 0.0}))
    return torch.allclose(moved.detach(), formula([gradient]), rtol=0.05)


def _coasts(live: Any, formula: Callable[[Sequence[Any]], Any]) -> bool:
    """Whether a gradient of ones and then one of zeros move a tensor as far as the formula says: where there is no
    gradient, a step is the betas' alone."""
    import torch

    group = live.param_groups[0]
    moved = torch.nn.Parameter(torch.zeros(SIDE, SIDE, device=group["params"][0].device))
    twin = _twin(live, group | {"params": [moved], "lr": 1.0, "weight_decay": 0.0})
    gradients = [torch.ones_like(moved), torch.zeros_like(moved)]
    for gradient in gradients:
        moved.grad = gradient.clone()
        type(live).step(twin)
    return torch.allclose(moved.detach(), formula(gradients), rtol=2e-5)


def _projected_for(built: Any, group: Mapping[str, Any]) -> int | None:
    """Steps after which the projector that the library makes for a tensor takes another basis; `None`: not in time."""
    import torch

    live, gap = optimizer(built), group["update_proj_gap"]
    moved = torch.nn.Parameter(torch.zeros(8, 8, device=group["params"][0].device))
    moved.grad = torch.ones_like(moved)
    twin = _twin(live, {**group, "params": [moved], "rank": 1})
    type(live).step(twin)
    projector = twin.state[moved]["projector"]
    for step in sorted({*range(1, min(gap, LOOKED) + 1), gap}):
        before = projector.ortho_matrix.clone()
        one = torch.zeros_like(moved)
        one[:, step % 8] = 1.0
        projector.project(one, step)
        if not torch.allclose(projector.ortho_matrix.abs(), before.abs()):
            return step
    return None


def _held(
    built: Any, wanted: dict[str, float], formula: Callable[[Sequence[Any]], Any] | None = None
) -> Iterator[Effect]:
    """Betas and epsilon, as every group of the optimizer holds them, and as steps show them that are `formula`'s.

    Of GaLore's gradients only epsilon's is tried here, and of the size that it has where it is projected.
    """
    live = optimizer(built)
    how = f"param_groups of {type(live).__name__}"
    held = {(*group.get("betas", (None, None)), group.get("eps")) for group in live.param_groups}
    projects = "rank" in live.param_groups[0]
    for place, key in enumerate(("beta1", "beta2", "eps")):
        if key in wanted:
            found = sorted({one[place] for one in held}, key=str)
            value = found[0] if len(found) == 1 else found
            if formula is not None and value == wanted[key]:
                if key != "eps" and not projects and not _coasts(live, formula):
                    value = "steps by other betas"
                # The square of such a gradient must be a number of 32 bits.
                elif key == "eps" and 1e-12 < value < 1:
                    size = value / SIDE**0.5 if projects else value
                    value = value if _damped(live, formula, size) else "steps by another"
            yield same(f"optim.{key}", wanted[key], value, how + (", and its steps" if formula else ""))


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
    if (off := _strays(built, expected, sampled)) is not None:
        right, how = False, f"{how}; but at step {off[0]} the optimizer's rate is {off[1]:.4g} of the peak"
    name = optim.scheduler
    if "scheduler" in built.config.tree["optim"]:
        yield Effect("optim.scheduler", name, name if right else rounded, right, how)
    reached = next((step for step in range(steps + 1) if factor(step) >= 1 - 1e-12), None)
    yield Effect(
        "optim.warmup_ratio",
        optim.warmup_ratio,
        None if reached is None else reached / steps,
        off is None and (reached == warmup or (warmup == steps and reached is None)),
        f"the rate peaks at step {reached} of {steps}",
    )


def _strays(built: Any, expected: Callable[[int], float], steps: Sequence[int]) -> tuple[int, float] | None:
    """The first step at which a group of the optimizer has another rate once the scheduler has stepped there, and which
    share of the peak it is."""
    live, scheduler = optimizer(built), built.trainer.lr_scheduler
    scheduler = getattr(scheduler, "scheduler", scheduler)
    rates = [group["lr"] for group in live.param_groups]
    kept = {name: vars(scheduler).get(name) for name in ("last_epoch", "_step_count", "_last_lr")}
    try:
        for step in (one for one in steps if one):
            scheduler.last_epoch, scheduler._step_count = step - 1, 2  # of a first step torch warns
            scheduler.step()
            for group in live.param_groups:
                wanted = group["initial_lr"] * expected(step)
                if not math.isclose(group["lr"], wanted, rel_tol=1e-6, abs_tol=1e-9 * group["initial_lr"]):
                    return step, group["lr"] / group["initial_lr"]
        return None
    except ValueError:  # it knows nothing of some group
        return step, math.nan
    finally:
        vars(scheduler).update(kept)
        for group, rate in zip(live.param_groups, rates, strict=True):
            group["lr"] = rate


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
