"""What adapters add to their layers' outputs: a library may hold the right numbers and compute with others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from soup.effects import Effect
from soup.effects.qat import _moved
from soup.effects.undisturbed import COARSE, too_large, undisturbed

INPUTS = 4  # rows that a layer is given
NEAR = 1e-3  # of what the adapter adds, in 32 bits
WIDEST = 8192  # inputs of a layer whose whole weight is asked for, which DoRA's norm needs


def outputs(built: Any, layers: Mapping[str, Any], adapter: str) -> Iterator[Effect]:
    """Speaks only of what is wrong: scale, magnitudes or dropout that the first layer of each name computes without.

    Layers that are fake-quantised, and experts, have probes of their own.
    """
    spec = built.config.lora
    if built.config.model.quantization_aware:
        return
    chosen: dict[str, Any] = {}
    for name, layer in layers.items():
        if not hasattr(layer, "parameter_name"):
            chosen.setdefault(name.rpartition(".")[2], layer)
    limit = COARSE if too_large(built) else NEAR
    key = "lora.use_dora" if spec.use_dora else "lora.alpha"
    asked = spec.use_dora if spec.use_dora else float(spec.alpha)
    with undisturbed(built):
        for name, layer in chosen.items():
            off, wet = _off(built, layer, adapter)
            if off > limit:
                how = f"what {name}'s adapter adds is {off:.2g} of its size off the formula's"
                yield Effect(key, asked, "another output", False, how)
            if wet is not (spec.dropout > 0):
                how = f"{name} in training mode {'differs from' if wet else 'is as'} in evaluation"
                yield Effect("lora.dropout", spec.dropout, "on" if wet else 0.0, False, how)


def _off(built: Any, layer: Any, adapter: str) -> tuple[float, bool]:
    """Distance of what the adapter adds from the formula's, over its norm; and whether training mode changes it."""
    base = layer.base_layer
    down_RI, up_OR = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    places = torch.arange(INPUTS * down_RI.shape[1], dtype=torch.float64).view(INPUTS, -1)
    dtype = built.precision.weights if too_large(built) else torch.float32
    x_NI = torch.sin(places**2).to(device=down_RI.device, dtype=dtype)
    layer.eval()
    with _moved(base, layer):
        plain_NO = base(x_NI).float()
        live_NO = layer(x_NI).float()
        added_NO = layer.scaling[adapter] * (x_NI.float() @ down_RI.float().T) @ up_OR.float().T
        if adapter in getattr(layer, "lora_magnitude_vector", {}):
            if down_RI.shape[1] > WIDEST:
                return 0.0, built.config.lora.dropout > 0
            added_NO = _dora(layer, adapter, plain_NO, added_NO, dtype)
        layer.training = True  # not its base, which bitsandbytes computes otherwise while it trains
        layer.lora_dropout.train()
        wet = not torch.equal(layer(x_NI).float(), live_NO)
    off = float((live_NO - plain_NO - added_NO).norm() / added_NO.norm().clamp(min=1e-12))
    return off, wet


def _dora(layer: Any, adapter: str, plain_NO: Tensor, added_NO: Tensor, dtype: Any) -> Tensor:
    """What DoRA adds (arXiv:2402.09353, eq. 5): m (W + s B A) / |W + s B A|, less W; W as the layer has it."""
    base, down_RI, up_OR = layer.base_layer, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    bias = getattr(base, "bias", None)
    bias_O = 0.0 if bias is None else bias.float()
    whole_IO = base(torch.eye(down_RI.shape[1], device=down_RI.device, dtype=dtype)).float() - bias_O
    whole_IO = whole_IO + layer.scaling[adapter] * (up_OR.float() @ down_RI.float()).T
    factor_O = layer.lora_magnitude_vector[adapter].weight.float().reshape(-1) / whole_IO.norm(dim=0)
    straight_NO = plain_NO - bias_O
    return (straight_NO + added_NO) * factor_O - straight_NO
