"""A linear layer and its adapter in one step, with the backward pass written out.

    y = x W^T + b + s (x A^T) B^T;   with d = dy B s:   dx = dy W + d A,   dA = d^T x,   dB = s dy^T (x A^T)
(arXiv:2106.09685, section 4.1). x (N, I), W (O, I) frozen, A (R, I), B (O, R). Kept for backward: x, and x A^T of R
numbers a token. PEFT's forward turns x into A's type and back, and adds in a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Collection
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, w_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        a, b = a_RI.to(x_NI.dtype), b_OR.to(x_NI.dtype)
        thin_NR = x_NI @ a.T
        y_NO = torch.nn.functional.linear(x_NI, w_OI, bias_O)
        y_NO.addmm_(thin_NR, b.T, alpha=scale)
        ctx.scale, ctx.kinds = scale, (a_RI.dtype, b_OR.dtype)
        ctx.save_for_backward(x_NI, w_OI, a, b, thin_NR)
        return y_NO

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, w_OI, a_RI, b_OR, thin_NR = ctx.saved_tensors
        d_NR = (dy_NO @ b_OR) * ctx.scale
        dx_NI = None
        if ctx.needs_input_grad[0]:
            dx_NI = dy_NO @ w_OI
            dx_NI.addmm_(d_NR, a_RI)
        da_RI = (d_NR.T @ x_NI).to(ctx.kinds[0])
        db_OR = (dy_NO.T @ thin_NR * ctx.scale).to(ctx.kinds[1])
        return dx_NI, None, None, da_RI, db_OR, None


def linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
) -> Tensor:
    """x of any leading shape; in autocast's type where there is one, as PEFT's products are, else in the weight's."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_OI.dtype
    bias_O = None if bias_O is None else bias_O.to(dtype)
    with torch.autocast(kind, enabled=False):
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        y_NO = _LoraLinear.apply(flat, weight_OI.to(dtype), bias_O, a_RI, b_OR, scale)
    return y_NO.view(*x.shape[:-1], -1)


def put_on(model: torch.nn.Module, beside: Collection[torch.nn.Module]) -> int | str:
    """Number of adapted layers that compute so from now on, or why there is none; `beside` are another kernel's."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and m not in beside]
    fit = [layer for layer in layers if obstacle(layer) is None]
    for layer in fit:
        layer.forward = MethodType(_forward, layer)
    if not layers:
        return "the gates have them all" if beside else "lora=none"
    return len(fit) or str(obstacle(layers[0]))


def obstacle(layer: LoraLayer) -> str | None:
    """Why an adapter is not A and B beside a plain matrix."""
    base = layer.get_base_layer()
    if type(layer) is not Linear or type(base) is not torch.nn.Linear:
        return f"it lies on {type(base).__name__}"
    if layer.lora_variant:
        return "lora.use_dora=true"
    if any(not isinstance(dropout, torch.nn.Identity) for dropout in layer.lora_dropout.values()):
        return "lora.dropout above 0"
    if list(layer.lora_A) != ["default"] or any(layer.lora_bias.values()):
        return "it has other parts"
    return None


def as_stock(layer: LoraLayer) -> bool:
    """Whether the adapter is off, merged, or not the only one."""
    return layer.disable_adapters or layer.merged or layer.active_adapters != ["default"]


def _forward(self: Linear, x: Tensor, *given: Any, **named: Any) -> Tensor:
    """In the place of PEFT's `Linear.forward`, which takes whatever is not one active adapter."""
    if given or named or as_stock(self):
        return type(self).forward(self, x, *given, **named)
    base = self.base_layer
    a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
    return linear(x, base.weight, base.bias, a, b, self.scaling["default"])
