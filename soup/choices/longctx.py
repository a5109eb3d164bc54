"""`longctx=`: rotary scaling and ring attention for contexts longer than the model's own."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt

from soup.specs import LongctxSpec

Factor = Annotated[float, Gt(1)]
Ring = Annotated[int, Ge(1)]


def none(
    *, rope_scaling_type: Literal["none"], rope_factor: None, use_ring_attention: bool, ring_size: Ring
) -> LongctxSpec:
    """The model's own rotary embedding."""
    return LongctxSpec(
        rope_scaling_type=rope_scaling_type,
        rope_factor=rope_factor,
        use_ring_attention=use_ring_attention,
        ring_size=ring_size,
        effects=("model:rope",),
    )


def rope(
    *,
    rope_scaling_type: Literal["linear", "dynamic", "yarn", "longrope", "llama3"],
    rope_factor: Factor | None,
    use_ring_attention: bool,
    ring_size: Ring,
) -> LongctxSpec:
    """Scaled rotary embedding: linear (arXiv:2306.15595), dynamic NTK, YaRN (arXiv:2309.00071), LongRoPE
    (arXiv:2402.13753), Llama 3. `rope_factor`: new length over the model's own, from `data.max_length` if null.
    """
    return LongctxSpec(
        rope_scaling_type=rope_scaling_type,
        rope_factor=rope_factor,
        use_ring_attention=use_ring_attention,
        ring_size=ring_size,
    )
