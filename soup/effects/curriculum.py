"""Whether rows come in the curriculum's order, by how hard each is: found out anew from what was prepared."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from soup.effects import Effect

MEASURED = 8  # rows whose loss is measured once more
KEYS = ("curriculum", "curriculum_metric", "curriculum_buckets")


def curriculum(built: Any) -> Iterator[Effect]:
    """Whether the first epoch's rows, cut where buckets end, grow harder from part to part.

    Where rows are packs, all documents of each must be of one bucket, and none be missing from it.
    """
    from soup.effects.loop import _batches, data_order

    training = built.config.training
    asked = built.config.tree["training"]
    if not training.curriculum:
        random = next(data_order(built)).ok
        for key in KEYS:
            how = "rows come as a random permutation has them"
            yield Effect(f"training.{key}", asked[key], asked[key] if random else "on", random, how)
        return
    right, told = _measured(built)
    parts = buckets(built)
    rows = len(built.trainer.train_dataset)
    if training.packing:
        rank = {row: place for place, part in enumerate(parts or ()) for row in part}
        told += (
            "; each row's documents are of one bucket"
            if parts
            else "; rows hold documents of several buckets"
        )
    else:
        rank = dict(enumerate(metric(built)))
    drawn = [rank.get(row, -1) for batch in _batches(built) for row in batch]

    def rises(sizes: Sequence[int]) -> bool:
        edges = list(itertools.accumulate(sizes, initial=0))
        cut = [drawn[a:b] for a, b in itertools.pairwise(edges) if b > a]
        return all(max(one) <= min(next_) for one, next_ in itertools.pairwise(cut))

    count = training.curriculum_buckets
    ok = right and parts is not None and len(drawn) == rows and rises([len(part) for part in parts])
    seen = count if ok else max(some for some in range(1, 21) if rises(_sizes(len(drawn), some)))
    name = asked["curriculum_metric"]
    how = f"the first epoch's {rows} rows in {count} parts: each begins where the one before ends, in {told}"
    yield Effect("training.curriculum", True, ok, ok, how)
    yield Effect("training.curriculum_metric", name, name if ok else None, ok, how)
    exact = ok and next(data_order(built)).ok
    yield Effect("training.curriculum_buckets", count, seen, exact, f"{how}; shuffled by the seed within")


def buckets(built: Any) -> list[list[int]] | None:
    """Numbers of the trainer's rows, bucket by bucket, easy first; `None` where packs do not keep to buckets."""
    return _packs(built, order(built)) if built.config.training.packing else order(built)


def order(built: Any) -> list[list[int]]:
    """Numbers of the prepared rows, bucket by bucket, easy first; all in one where there is no curriculum."""
    import torch

    training = built.config.training
    if not training.curriculum:
        return [list(range(built.prepared["train"].report.rows))]
    rows_R = torch.tensor(metric(built), dtype=torch.float64).sort(stable=True).indices
    return [part.tolist() for part in rows_R.split(_sizes(len(rows_R), training.curriculum_buckets))]


def _sizes(rows: int, parts: int) -> list[int]:
    return [rows // parts + (number < rows % parts) for number in range(parts)]


def metric(built: Any) -> list[float]:
    """How hard each prepared row is; its loss as the sampler has it, which `_measured` compares."""
    from soup.data.arrow import column
    from soup.effects.data import document_tokens

    kind = built.config.training.curriculum_metric
    if kind == "loss":
        held = getattr(built.trainer.curriculum, "metric_R", None)
        return [0.0] * built.prepared["train"].report.rows if held is None else list(map(float, held))
    if kind == "difficulty":
        return list(column(built.prepared["train"].open(), "difficulty"))
    return [float(tokens) for tokens in document_tokens(built)]


def _measured(built: Any) -> tuple[bool, str]:
    """Whether the base model's loss, on rows from the easiest to the hardest, is what they are sorted by."""
    import torch

    from soup.effects.undisturbed import COARSE, tolerance, undisturbed

    kind = built.config.training.curriculum_metric
    if kind != "loss":
        return True, {"length": "tokens", "difficulty": "difficulty"}[kind]
    held = metric(built)
    order = sorted(range(len(held)), key=held.__getitem__)
    some = sorted({round(place * (len(order) - 1) / (MEASURED - 1)) for place in range(MEASURED)})
    rows = _rows(built)
    with undisturbed(built):
        gaps = [
            abs(loss - held[number]) / max(1.0, loss)
            for number in (order[place] for place in some)
            for loss in (_loss(built, rows(number)),)
        ]
    # The loss was measured in the weights' own precision, and this is in 32 bits.
    allowed = tolerance(built) if built.precision.weights is torch.float32 else COARSE
    right = len(held) == built.prepared["train"].report.rows and max(gaps) <= allowed
    return (
        right,
        f"the base model's loss a token, which was measured again for {len(gaps)} rows: {max(gaps):.1e} off",
    )


def _loss(built: Any, row: dict[str, Any]) -> float:
    """Of the learnt tokens of a row, or of a pair's chosen answer, in sequences as long as a row may be."""
    from soup.effects.task import logps

    ids = row["input_ids"] if "input_ids" in row else [*row["prompt_ids"], *row["chosen_ids"]]
    labels = row["labels"] if "labels" in row else [-100] * len(row["prompt_ids"]) + row["chosen_ids"]
    limit, found = built.config.data.max_length, []
    for start in range(0, len(ids), limit):
        learnt = logps(built, ids[start : start + limit]).tolist()
        found += [
            p for p, label in zip(learnt, labels[start + 1 : start + limit], strict=True) if label != -100
        ]
    return -sum(found) / max(1, len(found))


def _rows(built: Any) -> Any:
    import pyarrow as pa

    table = pa.ipc.open_stream(pa.OSFile(str(built.prepared["train"].open()))).read_all()
    return lambda number: table.slice(number, 1).to_pylist()[0]


def _packs(built: Any, cut: list[list[int]]) -> list[list[int]] | None:
    """Numbers of the packs of each bucket: rows one after the other, until they hold just its documents."""
    from soup.effects.data import pieces
    from soup.effects.task import documents

    row, packs = _rows(built), iter(enumerate(built.trainer.train_dataset))
    found: list[list[int]] = []
    for numbers in cut:
        wanted = Counter(piece for number in numbers for piece in pieces(built, row(number)))
        held: Counter[Any] = Counter()
        found.append([])
        while sum(held.values()) < sum(wanted.values()):
            number, pack = next(packs, (-1, None))
            if pack is None:
                return None
            held.update((tuple(part["input_ids"]), tuple(part["labels"])) for part in documents(pack))
            found[-1].append(number)
        if held != wanted:
            return None
    return found if next(packs, None) is None else None
