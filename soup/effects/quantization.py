"""Weights that are held quantized by bitsandbytes: classes, storage, and what the layers compute with them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from soup.effects import Effect, same

QUANTIZED = ("Linear4bit", "Linear8bitLt")
# Distance of a layer's output from that of the weights on disk, over the latter's norm. NF4 of a normal distribution
# is 0.1 off; rows and inputs of 8 bits 0.01 each.
OFF = {"4bit": 0.2, "8bit": 0.05}
INPUTS = 8  # rows that a layer is given


def stored(built: Any) -> Iterator[Effect]:
    """Classes of the linear layers, the bytes that a weight takes, and their outputs against those of the folder."""
    import torch

    spec = built.config.model
    head = built.model.get_output_embeddings()
    ends = (head, getattr(head, "base_layer", head))  # an adapter may lie on the head
    found: dict[str, list[Any]] = {}
    leaves: dict[str, set[str]] = {}  # q_proj and the like, to the classes that they have
    for name, module in built.model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and module not in ends:
            found.setdefault(type(module).__name__, []).append(module)
            if ".score" not in f".{name}":  # a new head
                leaves.setdefault(plain(name + ".").split(".")[-2], set()).add(type(module).__name__)
    four, eight = (found.get(kind, []) for kind in QUANTIZED)
    rest = sum(map(len, found.values())) - len(four) - len(eight)
    effective = "4bit" if four else "8bit" if eight else "none"
    plain_ones = [name for name, kinds in leaves.items() if not kinds <= set(QUANTIZED)]
    if effective != "none" and plain_ones:
        effective = "mixed"
    how = f"{len(four)} Linear4bit, {len(eight)} Linear8bitLt, {rest} plain modules beside the head"
    if effective == "mixed":
        how += f", of the names {', '.join(sorted(plain_ones)[:3])}"
    ok = effective == spec.quantization
    if four:
        kinds = {(m.weight.quant_type, bool(getattr(m.weight.quant_state, "nested", False))) for m in four}
        how += f"; type and double quantization: {sorted(kinds)}"
        ok = ok and kinds == {("nf4", True)} and all(m.weight.dtype is torch.uint8 for m in four)
    ok = ok and all(m.weight.dtype is torch.int8 for m in eight)
    if four or eight:
        numbers, count = sum(map(_bytes, [*four, *eight])), sum(map(_weights, [*four, *eight]))
        # 4 bits, and of 64 weights a scale of one byte with 4 more for 256 of these; 8 bits, and a scale for each row
        expected = sum(_weights(m) * (0.5 + 1 / 64) + 4 * _blocks(m, 64 * 256) for m in four)
        expected += sum(_weights(m) + 4 * m.out_features for m in eight)
        how += f"; {numbers / count:.4f} bytes a weight"
        ok = ok and abs(numbers / expected - 1) < 0.01
        worst, compared = _forwards(built)
        if compared:
            how += f"; outputs of {compared} of them are at most {worst:.3f} off those of the weights on disk"
            ok = ok and worst < OFF.get(effective, 0.0)
        if not ok and effective == spec.quantization:
            effective = f"another {effective}"
    yield Effect("model.quantization", spec.quantization, effective, ok, how)
    fake = sum("FakeQuantized" in type(module).__name__ for module in built.model.modules())
    yield same(
        "model.quantization_aware", spec.quantization_aware, fake > 0, f"{fake} fake-quantised modules"
    )
    how = "nothing reads it while no module is fake-quantised"
    asked = spec.quantization_group_size
    yield Effect("model.quantization_group_size", asked, asked if not fake else "unknown", not fake, how)


def _forwards(built: Any) -> tuple[float, int]:
    """The largest relative distance between what a quantized layer computes and what the stored weight gives.

    The first layer of each name (q_proj and the like) is run, on a wave, in the precision that it trains in.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    chosen: dict[str, tuple[str, Any]] = {}
    for name, module in built.model.named_modules():
        if type(module).__name__ in QUANTIZED and isinstance(
            module, torch.nn.Linear
        ):  # PEFT's have these names too
            key = plain(name + ".")
            chosen.setdefault(key.split(".")[-2], (f"{key}weight", module))
    wanted = dict(chosen.values())
    worst, compared = 0.0, 0
    for name, take in tensors(built.model_folder):
        if name not in wanted:
            continue
        module, weight_OI = wanted[name], take(slice(None))
        if not weight_OI.is_floating_point():
            continue  # quantized on disk already
        if issubclass(getattr(module, "source_cls", object), Conv1D):  # GPT-2's, which bitsandbytes turns
            weight_OI = weight_OI.T
        places = torch.arange(INPUTS * weight_OI.shape[1], dtype=torch.float32).view(INPUTS, -1)
        wave_NI = torch.sin(places**2)
        expected_NO = wave_NI @ weight_OI.float().T
        kept = {
            key: vars(module)[key] for key in ("compute_type_is_set", "compute_dtype") if key in vars(module)
        }
        try:
            with torch.no_grad(), built.trainer.accelerator.autocast():
                given = wave_NI.to(device=module.weight.device, dtype=built.precision.weights)
                live_NO = module(given).float().cpu()
        finally:
            vars(module).update(kept)
        if module.bias is not None:
            live_NO = live_NO - module.bias.detach().float().cpu()
        worst = max(worst, float((live_NO - expected_NO).norm() / expected_NO.norm().clamp(min=1e-12)))
        compared += 1
    return worst, compared


def relative_error(module: Any, stored: Any) -> float:
    """Distance of a quantized layer's weight from the stored one, over the stored one's norm (Frobenius)."""
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    if type(module).__name__ == "Linear8bitLt":
        # PEFT's function, on a CPU, would leave the module without its scales after a forward (peft 0.21).
        scales_O = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        live = module.weight.detach().float().cpu() * scales_O.float().cpu()[:, None] / 127
    else:
        live = dequantize_module_weight(module).detach().float().cpu()
    stored = stored.float()
    if issubclass(getattr(module, "source_cls", object), Conv1D):
        stored = stored.T
    if live.shape != stored.shape:
        return float("inf")
    return float((live - stored).norm() / stored.norm().clamp(min=1e-12))


def _weights(module: Any) -> int:
    return module.in_features * module.out_features


def _blocks(module: Any, size: int) -> int:
    return -(-_weights(module) // size)


def _bytes(module: Any) -> int:
    """Of the weight and its scales, without the tables that all weights of a type have in common."""
    scales = []
    state = getattr(module.weight, "quant_state", None)
    while state is not None:
        scales.append(state.absmax)
        state = getattr(state, "state2", None)
    # of 8 bits: the first forward moves them from the weight to the state
    held = (getattr(module.weight, "SCB", None), getattr(getattr(module, "state", None), "SCB", None))
    if type(module).__name__ == "Linear8bitLt":
        scales += [one for one in held if one is not None][:1]
    return sum(one.numel() * one.element_size() for one in (module.weight, *scales))


def tensors(folder: Any) -> Iterator[tuple[str, Any]]:
    """Name of each tensor on disk, and a function that reads the given rows of it."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, lambda rows, name=name, file=tensors: file.get_slice(name)[rows]


def plain(name: str) -> str:
    """A parameter's name in the model's own file: without PEFT's wrappers."""
    return re.sub(r"\.base_layer(?=\.)", "", name.removeprefix("base_model.model."))
