"""How many rows documents fill when they are packed by best fit, as TRL packs them. Standard library only."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

CHUNK = 1000  # documents that are packed together (datasets' batch), and that stand for all in a plan


def best_fit(lengths: Iterable[int], size: int) -> int:
    """Rows of `size` tokens that best fit decreasing fills (arXiv:2404.10830); longer documents are cut first."""
    pieces = []
    for length in lengths:
        whole, rest = divmod(length, size)
        pieces += [size] * whole + [rest] * (rest > 0)
    rows, spaces = 0, list[int]()
    for piece in sorted(pieces, reverse=True):
        place = bisect_left(spaces, piece)
        if place == len(spaces):
            rows += 1
            left = size - piece
        else:
            left = spaces.pop(place) - piece
        if left:
            insort(spaces, left)
    return rows


def in_chunks(lengths: Sequence[int], size: int) -> int:
    """The same for documents that are packed CHUNK by CHUNK."""
    return sum(best_fit(lengths[start : start + CHUNK], size) for start in range(0, len(lengths), CHUNK))


def estimate(sample: Sequence[int], rows: int, size: int, *, buckets: int = 1, by_length: bool = True) -> int:
    """Rows that `rows` documents fill whose lengths the sorted `sample` stands for, packed within each bucket.

    `by_length`: a bucket holds documents of about one length; else it is like the whole.
    """
    total = 0.0
    for number in range(buckets):
        first, last = (len(sample) * edge // buckets for edge in (number, number + 1))
        part = sample[first:last] if by_length else sample[number::buckets]
        documents = rows / buckets
        taken = min(CHUNK, max(1, round(documents)))
        if part:
            stretched = [part[place * len(part) // taken] for place in range(taken)]
            total += best_fit(stretched, size) * documents / taken
    return max(1, round(total))
