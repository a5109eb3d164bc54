"""Quantization that is only simulated while training: which layers, with how many levels, and what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from soup.effects import Effect, as_it_was, same

BITS = {"4bit": 4, "8bit": 8}
# Distance of what a layer computes from the formula's weights, over the formula's distance from the plain ones:
# 1 where nothing is rounded. The rest is bfloat16's own rounding, which is half of 8 bits'.
OFF = 0.05
COARSE = {4: 0.2, 8: 0.6}
ADAPTED = 0.3  # norm of the adapter over that of its base, while outputs are compared


def simulated(built: Any) -> Iterator[Effect]:
    """Modules that are fake-quantised and those that should be; levels, groups, outputs and gradients of each."""
    spec, model = built.config.model, built.model
    found, missed = _layers(model)
    copy = getattr(built.trainer, "ref_model", None)
    beside: list[Any] = []
    if copy is not None:
        beside, plain = _layers(copy)
        missed += [f"the reference's {name}" for name in plain]
    measured = [_measure(module) for _, module, _ in [*found, *beside]]
    levels, sizes = (sorted({one[place] for one in measured}) for place in (0, 1))
    bits = BITS[spec.quantization]
    how = f"{len(found)} of {len(found) + len(missed)} linear layers beside the head compute with weights of {levels} "
    how += "levels, held unquantized"
    # One level less than 2^bits where the largest weights, which are half-way, are all rounded inwards.
    right = {(count - 1).bit_length() for count in levels} == {bits}
    effective = spec.quantization if right and not missed else f"{levels} levels"
    if missed:
        effective, how = "on some layers", f"{how}; not {', '.join(missed[:3])}"
    off = _outputs(built, found, bits) if found else 1.0
    limit = OFF if _product(built) is torch.float32 else COARSE[bits]
    right = effective == spec.quantization and off <= limit
    how += f"; their outputs are {off:.2g} of the rounding off the formula's"
    yield Effect(
        "model.quantization", spec.quantization, effective if off <= limit else "another", right, how
    )
    size = sizes[0] if len(sizes) == 1 else sizes
    how = "inputs that lose their value beside a large one, in each layer's quantizer"
    yield same("model.quantization_group_size", spec.quantization_group_size, size, how)
    reached, still = _gradients(built, found)
    how = f"{len(found)} fake-quantised modules; gradients reach {reached} tensors that train"
    if still:
        how += f", and not {', '.join(still[:3])}"
    aware = bool(found) and not missed and not still and reached > 0
    yield Effect("model.quantization_aware", True, aware, aware, how)


def _layers(model: Any) -> tuple[list[tuple[str, Any, Any]], list[str]]:
    """Fake-quantised layers, each as name, module and the adapter around it or `None`; and the plain ones' names."""
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    ends = (head, getattr(head, "base_layer", head))  # an adapter may lie on the head
    found, missed = [], []
    for name, module in modules.items():
        parts = name.split(".")
        if not isinstance(module, torch.nn.Linear) or module in ends or "lora_" in name or "score" in parts:
            continue
        if getattr(module, "weight_fake_quantizer", None) is None:
            missed.append(name)
            continue
        outer = modules[name.rpartition(".")[0]] if parts[-1] == "base_layer" else None
        found.append((name, module, outer))
    return found, missed


def _measure(module: Any) -> tuple[int, int]:
    """Levels that a layer's quantizer rounds a group to, and neighbouring inputs that share a scale."""
    quantizer = module.weight_fake_quantizer
    quantizer = getattr(quantizer, "quantizer", quantizer)  # without the adapter that is folded in
    with torch.no_grad():
        row_1I = torch.ones(1, 2 * module.in_features)
        row_1I[0, 0] = 1e4
        size = _run(quantizer(row_1I)[0])
        rows = 4096 // max(1, size - 1) + 1
        sweep_RG = torch.linspace(-1, 1, rows * size).view(rows, size).clone()
        sweep_RG[:, 0] = -1.0  # so that all rows have one scale
        levels = quantizer(sweep_RG).mul(2**14).round().unique()
    return len(levels), size


def _run(row: Tensor) -> int:
    """Length of the first group: the large value and the zeros behind it."""
    after = (row[1:] != 0).nonzero()
    return int(after[0]) + 1 if len(after) else len(row)


def _outputs(built: Any, found: list[tuple[str, Any, Any]], bits: int) -> float:
    """The worst of the layers: what they compute, adapters and all, against the formula's weights."""
    worst = 0.0
    with as_it_was(built.model), torch.no_grad():
        built.model.eval()
        for _, module, outer in found:
            with _moved(module, outer):
                worst = max(worst, _off(built, module, outer, bits))
    return worst


def _off(built: Any, module: Any, outer: Any, bits: int) -> float:
    """Distance on inputs that each show one column of the weight, over how far rounding moves these columns."""
    size = built.config.model.quantization_group_size
    weight_OI = _whole(module, outer)
    width = weight_OI.shape[1]
    columns = torch.arange(min(2 * size, width), device=weight_OI.device)
    shown_NI = torch.nn.functional.one_hot(columns, width).to(module.weight.dtype)
    whole = built.precision.weights is torch.float32  # its products in 16 bits would be no integers
    with nullcontext() if whole else built.trainer.accelerator.autocast():
        live_NO = (module if outer is None else outer)(shown_NI).float()
    if module.bias is not None:
        live_NO = live_NO - module.bias.float()
    plain_OI = weight_OI[:, : len(columns)]
    formula_OI = rounded(plain_OI, bits, size)
    # A group's largest weight lies half-way between two integers, so that its side is an accident.
    sure_OI = ~_largest(plain_OI, size)
    change = ((formula_OI - plain_OI) * sure_OI).norm()
    return float(((live_NO.T - formula_OI) * sure_OI).norm() / change) if change > 0 else 0.0


@contextmanager
def _moved(module: Any, outer: Any) -> Iterator[None]:
    """Adapters start at zero, where it does not show whether they are rounded with their base: B is set to a wave."""
    if outer is None:
        yield
        return
    kept = {name: outer.lora_B[name].weight.detach().clone() for name in outer.active_adapters}
    try:
        for name, before in kept.items():
            wave = torch.sin(torch.arange(before.numel(), device=before.device)).view_as(before)
            delta = outer.scaling[name] * (wave @ outer.lora_A[name].weight.float())
            size = ADAPTED * module.weight.float().norm() / delta.norm().clamp(min=1e-12)
            outer.lora_B[name].weight.copy_(size * wave)
        yield
    finally:
        for name, before in kept.items():
            outer.lora_B[name].weight.copy_(before)


def rounded(weight_OI: Tensor, bits: int, size: int) -> Tensor:
    """Symmetric rounding to integers of `bits`, a scale for each `size` inputs (arXiv:1712.05877, section 3)."""
    groups_OGS = weight_OI.unflatten(1, (-1, size))
    top = 2 ** (bits - 1)
    scale_OG1 = (groups_OGS.abs().amax(2, keepdim=True) / (top - 0.5)).clamp(min=1e-30)
    return ((groups_OGS / scale_OG1).round().clamp(-top, top - 1) * scale_OG1).flatten(1)


def _largest(weight_OI: Tensor, size: int) -> Tensor:
    groups_OGS = weight_OI.unflatten(1, (-1, size)).abs()
    return (groups_OGS >= 0.99 * groups_OGS.amax(2, keepdim=True)).flatten(1)


def _whole(module: Any, outer: Any) -> Tensor:
    """The layer's weight with its adapter folded in, in float32, shape (outputs, inputs)."""
    weight_OI = module.weight.detach().float()
    if outer is None:
        return weight_OI
    for name in outer.active_adapters:
        down, up = outer.lora_A[name].weight.float(), outer.lora_B[name].weight.float()
        weight_OI = weight_OI + outer.scaling[name] * (up @ down)
        if name in getattr(outer, "lora_magnitude_vector", {}):
            norm_O = weight_OI.norm(dim=1)
            weight_OI = weight_OI * (outer.lora_magnitude_vector[name].weight.float() / norm_O)[:, None]
    return weight_OI


def _gradients(built: Any, found: list[tuple[str, Any, Any]]) -> tuple[int, list[str]]:
    """In one backward pass of a few tokens: trained tensors of the layers that get a gradient, and layers without."""
    model = built.model
    ids_1T = torch.arange(8, device=built.trainer.args.device)[None]
    reached, still = 0, []
    try:
        with as_it_was(model), torch.enable_grad(), built.trainer.accelerator.autocast():
            model.eval()
            logits = model(input_ids=ids_1T, use_cache=False).logits.float()
            logits.log_softmax(-1).amax(-1).sum().backward() if logits.shape[
                -1
            ] > 1 else logits.sum().backward()
        for name, module, outer in found:
            trains = [p for p in (outer or module).parameters() if p.requires_grad]
            moved = [
                p
                for p in trains
                if p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any())
            ]
            reached += len(moved)
            if trains and not moved:
                still.append(name)
    finally:
        for parameter in model.parameters():
            parameter.grad = None
    return reached, still


def _product(built: Any) -> Any:
    return built.precision.autocast or built.precision.weights
