"""How a row is cut between the processes of a ring, and which part of its attention each computes when. No torch.

Zigzag (arXiv:2311.09431, as in ring-flash-attn): a row is 2R chunks, and process r holds chunks r and 2R-1-r, so
that under a causal mask all have the same to do; contiguous: R chunks, of which the last process's sees all others.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

LAYOUTS = ("zigzag", "contiguous")


@dataclass(frozen=True)
class Block:
    """Queries `q` of the own part see keys `k` of one that came, counted in the parts; `causal`: each up to its own."""

    q: range
    k: range
    causal: bool


def multiple(size: int, layout: str) -> int:
    """What a row's length must be a multiple of."""
    return 2 * size if layout == "zigzag" else size


def part(length: int, size: int, rank: int, layout: str) -> list[range]:
    """Positions of a row that a process holds, in order, as few stretches."""
    if layout == "contiguous":
        chunk = length // size
        return [range(rank * chunk, (rank + 1) * chunk)]
    chunk = length // (2 * size)
    low, high = rank, 2 * size - 1 - rank
    if high == low + 1:
        return [range(low * chunk, (high + 1) * chunk)]
    return [range(number * chunk, (number + 1) * chunk) for number in (low, high)]


def blocks(length: int, starts: Sequence[int], size: int, rank: int, owner: int, layout: str) -> list[Block]:
    """What `rank` computes while it holds the keys of `owner`.

    `starts`: first positions of the row's documents, which do not see each other, 0 among them, in order.
    """
    queries, keys = (part(length, size, who, layout) for who in (rank, owner))
    found = []
    for q, q_at in _placed(queries):
        for k, k_at in _placed(keys):
            for seen_q, seen_k in _seen(q, k, starts, length):
                found.append(
                    Block(_moved(seen_q, q_at - q.start), _moved(seen_k, k_at - k.start), causal=q == k)
                )
    return _joined(_joined(found))


def _placed(stretches: Iterable[range]) -> Iterator[tuple[range, int]]:
    """Stretches, and where in the part they begin."""
    at = 0
    for stretch in stretches:
        yield stretch, at
        at += len(stretch)


def _seen(q: range, k: range, starts: Sequence[int], length: int) -> Iterator[tuple[range, range]]:
    """Pairs of positions that attend: within a stretch each document by itself, to an earlier one the one that both
    have a part of."""
    first = bisect_right(starts, q.start) - 1
    if k == q:
        ends = [*starts[1:], length]
        for number in range(first, len(starts)):
            document = range(max(starts[number], q.start), min(ends[number], q.stop))
            if not document:
                return
            yield document, document
    elif k.start < q.start and starts[first] < k.stop:
        end = starts[first + 1] if first + 1 < len(starts) else length
        yield range(q.start, min(end, q.stop)), range(max(starts[first], k.start), k.stop)


def _moved(stretch: range, by: int) -> range:
    return range(stretch.start + by, stretch.stop + by)


def _joined(found: Iterable[Block]) -> list[Block]:
    """Neighbours with the same queries, or the same keys, in one call of a kernel."""
    joined: list[Block] = []
    for block in found:
        last = joined[-1] if joined else None
        if last is None or last.causal or block.causal:
            joined.append(block)
        elif last.q == block.q and last.k.stop == block.k.start:
            joined[-1] = Block(last.q, range(last.k.start, block.k.stop), causal=False)
        elif last.k == block.k and last.q.stop == block.q.start:
            joined[-1] = Block(range(last.q.start, block.q.stop), last.k, causal=False)
        else:
            joined.append(block)
    return joined
