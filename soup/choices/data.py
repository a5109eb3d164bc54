"""`data=`: the rows to learn from."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Len, Lt

from soup.specs import DataSpec

Format = Literal[
    "auto", "alpaca", "sharegpt", "messages", "prompt_completion", "preference", "unpaired", "prompt", "text"
]
Source = Annotated[str, Len(1)]
Sources = Annotated[list[Source], Len(1)]


def auto(
    *,
    train: Source | Sources | None,
    eval: Source | Sources | None,
    weights: Annotated[list[Annotated[float, Gt(0)]], Len(1)] | None,
    format: Format,
    max_length: Annotated[int, Ge(2)],
    eval_fraction: Annotated[float, Ge(0), Lt(1)],
    on_bad_row: Literal["refuse", "skip"],
    on_too_long: Literal["truncate", "skip", "refuse"],
    max_samples: Annotated[int, Ge(1)] | None,
    num_proc: Annotated[int, Ge(1)],
    streaming: bool,
) -> DataSpec:
    """Files, folders, globs or a hub name; each source's format is recognised from its first rows unless given."""
    return DataSpec(
        train=tuple(train) if isinstance(train, list) else train,
        eval=tuple(eval) if isinstance(eval, list) else eval,
        weights=None if weights is None else tuple(weights),
        format=format,
        max_length=max_length,
        eval_fraction=eval_fraction,
        on_bad_row=on_bad_row,
        on_too_long=on_too_long,
        max_samples=max_samples,
        num_proc=num_proc,
        streaming=streaming,
        effects=("data:rows", "data:samples", "data:sequence_length", "formats:learnt", "sources:shares"),
    )
