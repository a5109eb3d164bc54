"""Rows that are read while training, as the trainers take them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Features, IterableDataset
from datasets.info import DatasetInfo
from datasets.iterable_dataset import ExamplesIterable

from soup.data.arrow import schema_of
from soup.data.prepare import Prepared


def dataset(prepared: Prepared) -> IterableDataset:
    """The rows of the stream, without end; each iteration over them begins anew.

    One epoch for the trainer: an epoch that ends between two accumulated batches would else step on fewer of them, and
    transformers finds its place again in the first epoch of a stream only.
    """
    stream = prepared.stream

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(stream.drawn())

    columns = schema_of(stream.settings.shape, stream.first(1)[0])
    # Not `from_generator`, which pickles what it is given to name a cache.
    return IterableDataset(
        ex_iterable=ExamplesIterable(rows, {}), info=DatasetInfo(features=Features.from_arrow_schema(columns))
    )


def streams(rows: Any) -> bool:
    return isinstance(rows, IterableDataset)
