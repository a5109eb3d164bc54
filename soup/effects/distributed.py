"""How a run of several processes is spread: who waits how long, whose gradients are averaged, and what lies where.

What wraps or cuts the model is made when training begins, so `spread` is asked then, before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from soup.effects import Effect, as_it_was, same

TOLERANCE = 1e-2  # of gradients, which may be of 16 bits
PADDING = (
    4096  # numbers by which a share may be larger than its part of the whole, for each tensor that is cut
)


def patience(built: Any) -> Iterator[Effect]:
    """How long the group of processes waits for one of them."""
    import torch
    from torch.distributed.distributed_c10d import _get_default_group

    group = _get_default_group()
    kinds = {torch.device("cpu"), torch.device(built.device.kind)}
    found = sorted({group._get_backend(kind).options._timeout.total_seconds() for kind in kinds})
    how = "timeout of the group of processes"
    effective = found[0] if len(found) == 1 else found
    yield same("distributed.timeout_s", built.config.distributed.timeout_s, effective, how)


def spread(built: Any) -> Effect:
    """What the choice stands for, on the model as training will call it."""
    name = built.config.tree["distributed"]["name"]
    try:
        wrong, how = SPREAD[built.config.distributed.spread](built)
    except Exception as error:  # noqa: BLE001, what cannot run is refused as well
        wrong, how = "no forward and backward pass", f"{type(error).__name__}: {error}".splitlines()[0]
    return Effect("distributed.name", name, wrong or name, wrong is None, how)


def _ddp(built: Any) -> tuple[str | None, str]:
    import torch

    from soup.train import ranks

    wrapped = built.trainer.model_wrapped
    if not isinstance(wrapped, torch.nn.parallel.DistributedDataParallel):
        return "one process each", f"training calls {type(wrapped).__name__}"
    right, how = _averages(built, wrapped, wrapped.module)
    sums = ranks.gather([float(p.detach().double().sum()) for p in wrapped.parameters() if p.requires_grad])
    alike = all(one == sums[0] for one in sums)
    how += f"; trained weights are {'' if alike else 'not '}alike in all"
    return None if right and alike else "processes that learn apart", how


def _fsdp(built: Any) -> tuple[str | None, str]:
    """Parameters are DTensors of which each process holds its share; what becomes of them after a forward pass."""
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
    from torch.distributed.tensor import DTensor

    from soup.model.freeze import stack
    from soup.train import ranks

    spec, model, world = built.config.distributed, built.trainer.model_wrapped, ranks.world()
    models = [one for one in (model, getattr(built.trainer, "ref_model", None)) if one is not None]
    parameters = [p for one in models for p in one.parameters()]
    whole = [p for p in parameters if not isinstance(p, DTensor) or p.device_mesh.size() != world]
    if whole:
        return (
            "weights that are whole in each process",
            f"{len(whole)} of {len(parameters)} tensors are not cut",
        )
    held = sum(p.to_local().numel() for p in parameters)
    total = sum(p.numel() for p in parameters)
    share = held <= total / world + sum(p.numel() // max(1, p.shape[0]) for p in parameters if p.dim())
    how = f"{len(parameters)} tensors are DTensors; this process holds {held:,} of {total:,} numbers"
    groups = [
        m._get_fsdp_state()._fsdp_param_group
        for one in models
        for m in one.modules()
        if isinstance(m, FSDPModule)
    ]
    groups = [group for group in groups if group is not None]
    away = {isinstance(group.offload_policy, CPUOffloadPolicy) for group in groups}
    how += f"; offloaded to host memory: {', '.join(str(one).lower() for one in sorted(away))}"
    kinds = {p.to_local().device.type for p in parameters}
    placed = away == {bool(spec.offloads)} and kinds == {"cpu" if spec.offloads else built.device.kind}
    seen: list[bool] = []
    layers = [layer for one in models[:1] for layer in stack(one)[1]]
    handle = model.register_forward_hook(
        lambda *_: seen.extend(isinstance(p, DTensor) for layer in layers for p in layer.parameters())
    )
    try:
        right, told = _averages(built, model, model)
    finally:
        handle.remove()
    resharded = "weights" in spec.shards
    kept = bool(seen) and all(one is resharded for one in seen)
    how += f"; after a layer's forward pass its weights are {'shares' if all(seen) else 'whole'}; {told}"
    state = [t for one in built.trainer.optimizer.param_groups for t in one["params"]]
    cut = all(isinstance(one, DTensor) for one in state)
    how += f"; the optimizer has {len(state)} tensors, {'shares' if cut else 'not all of them shares'}"
    return None if share and placed and kept and right and cut else "another way of sharding", how


def _zero(built: Any) -> tuple[str | None, str]:
    """The live engine's stage; bytes of what the optimizer holds, of averaged gradients, and of weights."""
    from soup.train import ranks

    spec, trainer, world = built.config.distributed, built.trainer, ranks.world()
    engine = trainer.model_wrapped
    if type(engine).__name__ != "DeepSpeedEngine":
        return "one process each", f"training calls {type(engine).__name__}"
    wanted = 3 if "weights" in spec.shards else 2
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    trains = [p for p in trainer.model.parameters() if p.requires_grad]
    total = sum(_numbers(p) for p in trains)
    groups = (
        optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    )
    held = sum(group.numel() for group in groups)
    room = total / world + PADDING * len(groups)
    how = f"stage {stage}; the optimizer of this process has {held:,} of {total:,} numbers"
    wrong = None if stage == wanted and 0 < held <= room else f"stage {stage}"
    where = {group.device.type for group in groups}
    away = optimizer.cpu_offload if stage == 2 else optimizer.offload_optimizer
    how += f" on {', '.join(sorted(where))}, offloaded: {str(bool(away)).lower()}"
    if bool(away) != ("optimizer" in spec.offloads) or where != ({"cpu"} if away else {built.device.kind}):
        wrong = wrong or "the optimizer elsewhere"
    parts = [p.ds_tensor.numel() for p in trainer.model.parameters() if hasattr(p, "ds_tensor")]
    every = sum(_numbers(p) for p in trainer.model.parameters())
    here = sum(p.numel() for p in trainer.model.parameters()) + sum(parts)
    how += f"; weights: {here:,} of {every:,}"
    if wanted == 3 and here > every / world + world * len(parts) or wanted == 2 and here != every:
        wrong = wrong or "weights that are not shares"
    if float(engine.gradient_clipping()) != float(built.config.training.max_grad_norm):
        wrong, how = wrong or "other clipping", f"{how}; clips at {engine.gradient_clipping()}"
    right, told = _zero_gradients(built, engine)
    return wrong or (None if right else "processes that learn apart"), f"{how}; {told}"


def _numbers(parameter: Any) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _averages(built: Any, called: Any, inner: Any) -> tuple[bool, str]:
    """Whether gradients are the mean of all processes': the first learns from other tokens than the others, then all
    from the first one's, and all from the others'. Each process looks at what it holds."""
    from soup.train import ranks

    world, first = ranks.world(), ranks.first()
    own = _gradients(built, called, inner, 0 if first else 1)
    size = max((float(g.abs().max()) for g in own.values() if g.numel()), default=0.0)
    names = own.keys()
    complete = bool(own)
    for offset, share in ((0, 1 / world), (1, 1 - 1 / world)):
        alike = _gradients(built, called, inner, offset)
        complete = complete and alike.keys() == names
        for name in names & alike.keys():
            own[name] -= share * alike[name]
    off = max((float(g.abs().max()) for g in own.values() if g.numel()), default=0.0)
    off, size = max(ranks.gather(off)), max(ranks.gather(size))
    how = f"gradients of {len(own)} tensors are off the mean of {world} processes by "
    how += f"{off / (size or 1):.1e} of the largest"
    return complete and size > 0 and off <= TOLERANCE * size, how


def _gradients(built: Any, called: Any, inner: Any, offset: int) -> dict[str, Any]:
    """Of a loss of a few tokens, by the parameter's name, as far as this process holds them; in float32."""
    _pass(built, called, inner, offset, lambda loss: loss.backward())
    found = {}
    for name, parameter in inner.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            found[name] = (gradient.to_local() if hasattr(gradient, "to_local") else gradient).float().clone()
            parameter.grad = None
    return found


def _pass(built: Any, called: Any, inner: Any, offset: int, backward: Callable[[Any], Any]) -> None:
    """A forward and backward pass of 8 tokens in training mode; dropout is the same in each."""
    import torch

    ids_1T = torch.arange(8, device=built.trainer.args.device)[None] + 3 * offset
    with as_it_was(inner):
        torch.manual_seed(0)
        inner.train()
        with built.trainer.accelerator.autocast():
            loss = called(input_ids=ids_1T, use_cache=False).logits.float().pow(2).mean()
        backward(loss)


def _zero_gradients(built: Any, engine: Any) -> tuple[bool, str]:
    """The same of ZeRO, which keeps averaged gradients of its share itself."""
    from soup.train import ranks

    def averaged(offset: int) -> Any:
        import torch

        engine.set_gradient_accumulation_boundary(True)
        _pass(built, engine, engine.module, offset, partial(engine.backward, scale_wrt_gas=False))
        optimizer = engine.optimizer
        kept = optimizer.averaged_gradients if optimizer.averaged_gradients else {}
        flat = [g.detach().float().flatten() for part in kept.values() if part for g in part if g is not None]
        if not flat and hasattr(
            optimizer, "single_partition_of_fp32_groups"
        ):  # offloaded: where the optimizer is
            flat = [
                p.grad.detach().float().flatten()
                for p in optimizer.single_partition_of_fp32_groups
                if p.grad is not None
            ]
        found = torch.cat(flat).clone() if flat else torch.zeros(0)
        _forget(engine)
        return found

    world, first = ranks.world(), ranks.first()
    own = averaged(0 if first else 1)
    size, numbers = float(own.abs().max()) if own.numel() else 0.0, own.numel()
    for offset, share in ((0, 1 / world), (1, 1 - 1 / world)):
        own = own - share * averaged(offset)
    off = float(own.abs().max()) if own.numel() else 0.0
    off, size = max(ranks.gather(off)), max(ranks.gather(size))
    how = f"gradients of {numbers:,} numbers here are off the mean of {world} processes by "
    how += f"{off / (size or 1):.1e} of the largest"
    return size > 0 and off <= TOLERANCE * size, how


def _forget(engine: Any) -> None:
    """Takes back what a backward pass left in the engine."""
    optimizer = engine.optimizer
    optimizer.zero_grad()
    if optimizer.averaged_gradients:
        optimizer.averaged_gradients = {}
    for group in getattr(optimizer, "single_partition_of_fp32_groups", []):
        if group.grad is not None:
            group.grad.zero_()  # where gradients are offloaded to
    if hasattr(optimizer, "reset_cpu_buffers"):
        optimizer.reset_cpu_buffers()
    if engine.zero_optimization_stage() < 3:
        optimizer.micro_step_id = -1  # as its own step() does; offloaded gradients would add up
        optimizer._offload_accumulated_param_ids = set()
    engine.micro_steps = 0


SPREAD = {"ddp": _ddp, "fsdp": _fsdp, "deepspeed": _zero}
