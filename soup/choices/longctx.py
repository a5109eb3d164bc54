"""`longctx=`: rotary scaling and ring attention for contexts longer than the model's own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Len

from soup.specs import LongctxSpec

Factor = Annotated[float, Gt(1)]
Ring = Annotated[int, Ge(1)]
Layout = Literal["zigzag", "contiguous"]
Positive = Annotated[float, Gt(0)]
Factors = Annotated[list[Positive], Len(1)]


def none(
    *,
    rope_scaling_type: Literal["none"],
    rope_factor: None,
    use_ring_attention: bool,
    ring_size: Ring,
    ring_layout: Layout,
) -> LongctxSpec:
    """The model's own rotary embedding."""
    return _spec(rope_scaling_type, rope_factor, use_ring_attention, ring_size, ring_layout)


def rope(
    *,
    rope_scaling_type: Literal["linear", "dynamic"],
    rope_factor: Factor | None,
    use_ring_attention: bool,
    ring_size: Ring,
    ring_layout: Layout,
) -> LongctxSpec:
    """Linear position interpolation (arXiv:2306.15595), and dynamic NTK scaling as in arXiv:2309.00071, appendix B."""
    return _spec(rope_scaling_type, rope_factor, use_ring_attention, ring_size, ring_layout)


def yarn(
    *,
    rope_scaling_type: Literal["yarn"],
    rope_factor: Factor | None,
    use_ring_attention: bool,
    ring_size: Ring,
    ring_layout: Layout,
    beta_fast: Positive,
    beta_slow: Positive,
) -> LongctxSpec:
    """YaRN (arXiv:2309.00071): what turns more than `beta_fast` times in the model's own context stays as it is, what
    turns less than `beta_slow` times is interpolated, and attention is sharpened by 0.1 ln(factor) + 1."""
    return _spec(
        rope_scaling_type,
        rope_factor,
        use_ring_attention,
        ring_size,
        ring_layout,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
    )


def longrope(
    *,
    rope_scaling_type: Literal["longrope"],
    rope_factor: Factor | None,
    use_ring_attention: bool,
    ring_size: Ring,
    ring_layout: Layout,
    short_factor: Factors | None,
    long_factor: Factors | None,
) -> LongctxSpec:
    """LongRoPE (arXiv:2402.13753): a factor for each frequency, found by search; soup does not search."""
    return _spec(
        rope_scaling_type,
        rope_factor,
        use_ring_attention,
        ring_size,
        ring_layout,
        short_factor=short_factor,
        long_factor=long_factor,
    )


def llama3(
    *,
    rope_scaling_type: Literal["llama3"],
    rope_factor: Factor | None,
    use_ring_attention: bool,
    ring_size: Ring,
    ring_layout: Layout,
    low_freq_factor: Positive,
    high_freq_factor: Positive,
) -> LongctxSpec:
    """Llama 3.1's scaling: what turns more than `high_freq_factor` times in the model's own context stays as it is,
    what turns less than `low_freq_factor` times is interpolated."""
    return _spec(
        rope_scaling_type,
        rope_factor,
        use_ring_attention,
        ring_size,
        ring_layout,
        low_freq_factor=low_freq_factor,
        high_freq_factor=high_freq_factor,
    )


def _spec(
    kind: str, factor: float | None, ring: bool, size: int, layout: str, **parameters: Any
) -> LongctxSpec:
    return LongctxSpec(
        rope_scaling_type=kind,
        rope_factor=factor,
        use_ring_attention=ring,
        ring_size=size,
        ring_layout=layout,
        parameters=parameters,
        effects=("rope:rope", "ring:ring"),
    )
