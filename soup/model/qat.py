"""Quantization-aware training: layers that compute with the integers that the exported weights will be.

torchao's fake quantization rounds a weight to what 4 or 8 bits can hold, in groups of neighbouring inputs that share a
scale, and lets the gradient through (Jacob et al. 2018, arXiv:1712.05877). What is rounded is the weight that
`runs export --quantized` writes, with the adapter folded in: rounding the base alone would train another model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from soup.errors import Problem, Refused
from soup.model.groups import whole_groups
from soup.specs import ModelSpec

BITS = {"4bit": torch.int4, "8bit": torch.int8}


def fake_quantize(model: nn.Module, spec: ModelSpec) -> None:
    """Puts torchao's FakeQuantizedLinear in the place of every linear layer but the head; parameters stay the same.

    Raises:
        Refused: no linear layer, or one whose inputs do not fill whole groups.
    """
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    found = dict(linears(model))
    if not found:
        raise Refused(
            Problem(
                key="model.quantization_aware",
                value="true",
                why=f"{type(model).__name__} has no linear layer that torchao's fake quantization wraps",
                fix="model.quantization_aware=false",
            )
        )
    whole_groups(spec, {name.rpartition(".")[2]: layer.in_features for name, layer in found.items()})
    weight = IntxFakeQuantizeConfig(BITS[spec.quantization], group_size=spec.quantization_group_size)
    with torch.random.fork_rng():  # the new layers draw weights before they are given theirs
        quantize_(
            model, QATConfig(weight_config=weight, step="prepare"), filter_fn=lambda _, name: name in found
        )
    for module in model.modules():
        if getattr(module, "weight_fake_quantizer", None) is not None:
            module.weight_fake_quantizer = Simulated(module.weight_fake_quantizer)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers that quantization reaches: all but a score head and the layer that gives logits."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and "score" not in name.split("."):
            yield name, module


def fold_adapters(model: nn.Module) -> None:
    """Lets the layers that have an adapter simulate base and adapter folded together."""
    for layer in model.modules():
        if hasattr(layer, "lora_A") and hasattr(layer.get_base_layer(), "weight_fake_quantizer"):
            layer.get_base_layer().weight_fake_quantizer.layer = (layer,)


class Simulated(nn.Module):
    """The weight that a fake-quantised layer computes with, rounded in float32 as an export is.

    Beside an adapter it is the weight V for which V x and the adapter's own output add up to Q(whole) x. PEFT
    computes k (V + D) x, with D = scaling B A, and k = 1 or DoRA's magnitude over norm for each output. So
    V = Q(k (W + D)) / k - D. V takes no gradient: D's comes by the adapter's output, and is that of Q's
    straight-through estimate. With adapters off, as in a reference, V = Q(W): the policy as it starts.
    """

    def __init__(self, quantizer: nn.Module):
        super().__init__()
        self.quantizer = quantizer
        self.layer: tuple[Any, ...] = ()  # in a tuple, or the layer would become a part of its own part

    def forward(self, weight: Tensor) -> Tensor:
        if not self.layer or self.layer[0].disable_adapters or self.layer[0].merged:
            return self.quantizer(weight.float()).to(weight.dtype)
        (layer,) = self.layer
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            (name,) = layer.active_adapters
            delta = layer.get_delta_weight(name).float()
            whole = weight.float() + delta
            scale = _magnitude(layer, name, whole)
            return (self.quantizer(whole * scale) / scale - delta).to(weight.dtype)


def _magnitude(layer: Any, name: str, whole: Tensor) -> Tensor | float:
    """DoRA's magnitude over the norm of each output's weights, shape (outputs, 1); 1 without DoRA."""
    vectors = getattr(layer, "lora_magnitude_vector", {})
    if name not in vectors:
        return 1.0
    return (vectors[name].weight / whole.norm(dim=1))[:, None]
