"""`lora=`: low-rank adapters, or none to train all weights."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Len, Lt

from soup.specs import LoraSpec

Module = Annotated[str, Len(1)]


def none() -> LoraSpec:
    """All weights train."""
    return LoraSpec(effects=("adapters:trainable",))


def lora(
    *,
    r: Annotated[int, Ge(1)],
    alpha: Annotated[float, Gt(0)],
    dropout: Annotated[float, Ge(0), Lt(1)],
    target_modules: Module | Annotated[list[Module], Len(1)],
    use_dora: bool,
    use_rslora: bool,
    loraplus_lr_ratio: Annotated[float, Gt(0)] | None,
) -> LoraSpec:
    """LoRA (Hu et al. 2021, arXiv:2106.09685): W + (alpha / r) B A with W frozen.

    `use_dora`: DoRA (arXiv:2402.09353). `use_rslora`: the scale is alpha / sqrt(r) (arXiv:2312.03732).
    `loraplus_lr_ratio`: LoRA+ (arXiv:2402.12354), B learns at this many times A's rate, and so do DoRA's magnitudes.
    """
    return LoraSpec(
        r=r,
        alpha=alpha,
        dropout=dropout,
        target_modules=target_modules if isinstance(target_modules, str) else tuple(target_modules),
        use_dora=use_dora,
        use_rslora=use_rslora,
        loraplus_lr_ratio=loraplus_lr_ratio,
        effects=("adapters:adapter", "adapters:trainable"),
    )
