"""The last product of a gated MLP, taken together with what goes into it, which backward computes again.

    h = silu(g) * u,  y = h W^T + b + s (h A^T) B^T;   dh = dy W + s (dy B) A,
    dg = dh u silu'(g),  du = dh silu(g),  dA = s (dy B)^T h,  dB = s dy^T (h A^T),  dW = dy^T h
(arXiv:2002.05202, SwiGLU; arXiv:2106.09685). g, u (N, F) are kept; autograd also keeps silu(g) and h of each layer.
W is (O, F), A (R, F), B (O, R); without an adapter A and B are None.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from soup.kernels import lora

PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate_NF: Tensor,
        up_NF: Tensor,
        w_OF: Tensor,
        bias_O: Tensor | None,
        a_RF: Tensor | None,
        b_OR: Tensor | None,
        scale: float,
    ) -> Tensor:
        h_NF = silu(gate_NF) * up_NF
        y_NO = linear(h_NF, w_OF, bias_O)
        thin_NR = None
        if a_RF is not None:
            thin_NR = h_NF @ a_RF.T
            y_NO.addmm_(thin_NR, b_OR.T, alpha=scale)
        ctx.scale = scale
        ctx.save_for_backward(gate_NF, up_NF, w_OF, a_RF, b_OR, thin_NR)
        return y_NO

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        gate_NF, up_NF, w_OF, a_RF, b_OR, thin_NR = ctx.saved_tensors
        wants_gate, wants_up, wants_w, wants_bias, wants_a, wants_b, _ = ctx.needs_input_grad
        dgate_NF = dup_NF = dw_OF = dbias_O = da_RF = db_OR = None
        act_NF = silu(gate_NF)
        if a_RF is not None:
            d_NR = (dy_NO @ b_OR) * ctx.scale
        if wants_w or wants_a:
            h_NF = act_NF * up_NF
            dw_OF = dy_NO.T @ h_NF if wants_w else None
            da_RF = d_NR.T @ h_NF if wants_a else None
            del h_NF
        if wants_b:
            db_OR = dy_NO.T @ thin_NR * ctx.scale
        if wants_bias:
            dbias_O = dy_NO.sum(0)
        if wants_gate or wants_up:
            dh_NF = dy_NO @ w_OF
            if a_RF is not None:
                dh_NF.addmm_(d_NR, a_RF)
            dup_NF = act_NF.mul_(dh_NF)
            dgate_NF = torch.ops.aten.silu_backward(dh_NF.mul_(up_NF), gate_NF)
        return dgate_NF, dup_NF, dw_OF, dbias_O, da_RF, db_OR, None


def gated_linear(
    gate: Tensor,
    up: Tensor,
    w_OF: Tensor,
    bias_O: Tensor | None,
    a_RF: Tensor | None = None,
    b_OR: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """gate and up of any leading shape, of one type; weights are turned into it, as autocast does."""
    dtype = gate.dtype
    rest = [None if one is None else one.to(dtype) for one in (w_OF, bias_O, a_RF, b_OR)]
    with torch.autocast(gate.device.type, enabled=False):
        y_NO = _GatedLinear.apply(gate.flatten(0, -2), up.flatten(0, -2), *rest, scale)
    return y_NO.view(*gate.shape[:-1], -1)


def put_on(model: nn.Module) -> int | str:
    """Number of MLPs that compute so from now on, or why there is none."""
    found = [module for module in model.modules() if all(hasattr(module, part) for part in PARTS)]
    whys = [_obstacle(module) for module in found]
    for mlp, why in zip(found, whys, strict=True):
        if why is None:
            mlp.forward = MethodType(_forward, mlp)
    if not found:
        return "the model has no gated MLP of three layers"
    return whys.count(None) or str(whys[0])


def adapters(model: nn.Module) -> set[nn.Module]:
    """The adapted layers that are computed here."""
    own = [module for module in model.modules() if getattr(module.forward, "__func__", None) is _forward]
    return {mlp.down_proj for mlp in own if isinstance(mlp.down_proj, LoraLayer)}


def _obstacle(mlp: Any) -> str | None:
    """Why an MLP is not that formula on plain or simply adapted layers: looked at, and tried."""
    down = mlp.down_proj
    if isinstance(down, LoraLayer):
        if (why := lora.obstacle(down)) is not None:
            return why
    elif type(down) is not nn.Linear:
        return f"it lies on {type(down).__name__}"
    weight = getattr(mlp.gate_proj, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return f"its gate is {type(mlp.gate_proj).__name__}"
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        try:
            stock, ours = mlp(x).float(), _forward(mlp, x).float()
        except (RuntimeError, TypeError, ValueError) as error:
            return f"{type(mlp).__name__} takes something else: {str(error).splitlines()[0]}"
    close = 1e-4 if weight.dtype is torch.float32 else 0.03
    if (stock - ours).abs().mean() > close * stock.abs().mean():
        return f"{type(mlp).__name__} computes something else"
    return None


def _forward(self: Any, x: Tensor) -> Tensor:
    gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
    if gate.dtype is not up.dtype or down._forward_hooks or down._forward_pre_hooks:
        return down(self.act_fn(gate) * up)
    if not isinstance(down, LoraLayer):
        return gated_linear(gate, up, down.weight, down.bias)
    if lora.as_stock(down):
        return down(self.act_fn(gate) * up)
    base = down.base_layer
    a, b = down.lora_A["default"].weight, down.lora_B["default"].weight
    return gated_linear(gate, up, base.weight, base.bias, a, b, down.scaling["default"])
