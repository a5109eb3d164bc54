"""Several sources as one: in which order their rows come, and the order in which a stream is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def mixed(sources: Sequence[Iterator[T]], shares: Sequence[float] | None) -> Iterator[tuple[int, T]]:
    """Rows, each with the number of its source.

    Without shares one source after the other. With them the next row is of the source that is furthest behind
    its share, so that every beginning of the mix has the shares to within a row of each source; the mix ends where
    that source has no row left (`datasets.interleave_datasets` calls it first_exhausted), so no row is there twice.
    """
    if shares is None:
        for number, source in enumerate(sources):
            for row in source:
                yield number, row
        return
    taken = [0] * len(sources)
    while True:
        count = sum(taken) + 1
        number = max(range(len(sources)), key=lambda n: shares[n] * count - taken[n])
        row = next(sources[number], None)
        if row is None:
            return
        taken[number] += 1
        yield number, row


def shuffled(rows: Iterator[T], *, buffer_rows: int, seed: int) -> Iterator[T]:
    """Rows drawn from a buffer that is kept full, as `datasets.IterableDataset.shuffle` draws them."""
    import numpy as np

    generator = np.random.default_rng(seed)
    places = _places(generator, buffer_rows)
    buffer: list[T] = []
    for row in rows:
        if len(buffer) < buffer_rows:
            buffer.append(row)
            continue
        place = next(places)
        yield buffer[place]
        buffer[place] = row
    generator.shuffle(buffer)
    yield from buffer


def _places(generator: object, buffer_rows: int) -> Iterator[int]:
    while True:
        yield from map(int, generator.integers(0, buffer_rows, size=1000))
