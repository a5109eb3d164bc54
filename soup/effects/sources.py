"""Where the trainer's rows come from: the shares of several sources, and the rows of a stream, read beside it.

A stream is read anew here, and as far as its first rows: the trainer's own reading begins at the first row again.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from soup.effects import Effect

FIRST = 64  # rows of a stream that probes look at
BRIEF = 2048  # tokens of a row that is cut for a ring, that one process passes through the model
DOCUMENTS = 8  # of such a row
COUNTED = 600  # whose sources are counted, and by which max_samples is looked for
LABELLED = 8  # rows of each source that are read once more, to see that they are where they are said to be
DEVIATIONS = 4.5  # of the share of a source among rows that were drawn at random

_held: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def is_stream(rows: Any) -> bool:
    return type(rows).__name__ == "IterableDataset"


def held(built: Any) -> Any:
    """The trainer's training rows; of a stream the first FIRST."""
    from datasets import Dataset

    rows = built.trainer.train_dataset
    if not is_stream(rows):
        return rows
    if rows not in _held:
        _held[rows] = Dataset.from_list(list(itertools.islice(rows, FIRST)))
    return _held[rows]


def brief(built: Any, example: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row as one process can pass it: of one that is cut for a ring, some tokens."""
    return cut(example, BRIEF) if built.config.longctx.use_ring_attention else example


def cut(example: Mapping[str, Any], most: int) -> Mapping[str, Any]:
    """Of a row with labels that has more tokens than that, parts of the first documents that are learnt."""
    if len(example["input_ids"]) <= most:
        return example
    lengths = list(example.get("seq_lengths", [len(example["input_ids"])]))[:DOCUMENTS]
    room, kept = most // len(lengths), []
    for end, length in zip(itertools.accumulate(lengths), lengths, strict=True):
        labels = example["labels"][end - length + 1 : end]
        learnt = next((place for place, label in enumerate(labels, 1) if label != -100), 0)
        start = end - length + max(0, min(learnt - room // 2, length - room))
        kept.append(range(start, min(start + room, end)))
    parts = {n: [example[n][at] for part in kept for at in part] for n in ("input_ids", "labels")}
    return parts | ({"seq_lengths": [len(part) for part in kept]} if "seq_lengths" in example else {})


def shares(built: Any) -> Iterator[Effect]:
    """Rows of each source among those that the trainer holds, or of a stream among those that come first."""
    from soup.effects.data import intact

    settings, asked = _settings(built), built.config.tree["data"]["weights"]
    names = settings.names("train")
    if len(names) == 1:
        yield Effect("data.weights", asked, None, asked is None, "there is one source")
        return
    wanted = settings.shares("train")
    shared, drawn = 0, False
    if is_stream(built.trainer.train_dataset):
        count_S, shared, drawn = _counted(built, settings)
    else:
        prepared = [one for split, one in built.prepared.items() if split == "train" or settings.eval is None]
        whole = intact(built, built.trainer.train_dataset, built.prepared["train"])
        count_S = _labelled(settings, prepared) if whole else None
    if count_S is None:
        yield Effect("data.weights", asked, "unknown rows", False, "rows that no source has")
        return
    total = sum(count_S) + shared
    how = "rows: " + ", ".join(f"{count} of {name}" for count, name in zip(count_S, names, strict=True))
    how += f", {shared} that several have" if shared else ""
    if wanted is None:
        ok = all(count_S) or shared > 0 if drawn or settings.max_samples else _all_taken(built, total)
        yield Effect("data.weights", None, None if ok else "a part", ok, how)
        return
    ok = True
    for count, share in zip(count_S, wanted, strict=True):
        room = len(names) + (DEVIATIONS * math.sqrt(total * share * (1 - share)) if drawn else 0.0)
        ok = ok and count - room <= share * total <= count + shared + room
    found = [round(sum(asked) * count / total, 4) for count in count_S]
    yield Effect("data.weights", asked, asked if ok else found, ok, how)


def _all_taken(built: Any, total: int) -> bool:
    """Whether no row is missing but those that were counted as lost."""
    report = built.prepared["train"].report
    lost = report.bad_total + report.skipped + report.dropped_nothing_left
    return total >= sum(source["read"] for source in report.sources) - lost


def _labelled(settings: Any, prepared: Sequence[Any]) -> list[int] | None:
    """Prepared rows of each source; `None` where the first rows of one, read alone, are not there under its number."""
    import numpy as np
    import pyarrow as pa

    count_S = np.zeros(len(settings.names("train")), dtype=int)
    there: dict[int, set[str]] = {}
    for one in prepared:
        source_R = one.sources()
        count_S += np.bincount(source_R, minlength=len(count_S))
        with pa.memory_map(str(one.open())) as file:
            table = pa.ipc.open_stream(file).read_all()
            for number in range(len(count_S)):
                first = np.flatnonzero(source_R == number)[:LABELLED]
                there.setdefault(number, set()).update(map(_key, table.take(first).to_pylist()))
    for number, count in enumerate(count_S):
        for row in itertools.islice(_alone(settings, number), min(LABELLED, int(count))):
            if _key({name: row.get(name) for name in prepared[0].columns}) not in there[number]:
                return None
    return count_S.tolist()


def _counted(built: Any, settings: Any) -> tuple[list[int] | None, int, bool]:
    """Of the first rows of the stream those of each source, `None` where one is of none; those that several sources
    have; and whether they are drawn from more than were read.
    """
    from soup.data.stream import BUFFER_ROWS

    report = built.prepared["train"].report
    drawn = report.sampled or report.rows > COUNTED
    number_of = COUNTED if drawn else report.rows
    names = _names(built, next(from_files(built)))
    sources: dict[str, set[int]] = {}
    for number in range(len(settings.names("train"))):
        for row in itertools.islice(_alone(settings, number), BUFFER_ROWS + number_of):
            sources.setdefault(_key(row, names), set()).add(number)
    counts: Counter[int | None] = Counter()
    for row in itertools.islice(built.trainer.train_dataset, number_of):
        its = sources.get(_key(row, names))
        if its is None:
            return None, 0, drawn
        counts[min(its) if len(its) == 1 else None] += 1
    return [counts[number] for number in range(len(settings.names("train")))], counts[None], drawn


def _alone(settings: Any, number: int) -> Iterator[dict[str, Any]]:
    """The usable rows of one source, without those beside it."""
    from soup.data.sources import sources
    from soup.data.stream import plain

    for row in sources(settings, "train")[number]:
        yield plain(row.columns)


def streamed_rows(built: Any) -> Iterator[Effect]:
    """The first rows that the stream gives the trainer, against the same rows of the files."""
    data = built.config.tree["data"]
    drawn, expected = _both(built)
    ok = Counter(drawn) == Counter(expected)
    how = f"the first {len(drawn)} rows of the trainer's stream are those that are drawn from the files"
    yield Effect("data.train", data["train"], "a stream" if ok else "other rows", ok, how)


def in_order(built: Any) -> tuple[bool, int]:
    """Whether the stream's first rows come as `datasets` shuffles them by the seed, and how many were compared.

    The loader must give them as they come: the columns that it leaves of its first batch are those rows'.
    """
    drawn, expected = _both(built)
    rows = held(built)
    given = zip(first_batch(built), rows, strict=False)
    as_given = all(row[name] == one[name] for row, one in given for name in row)
    return drawn == expected and as_given, len(drawn)


def first_batch(built: Any) -> list[Mapping[str, Any]]:
    """The rows that the loader of a stream hands to the collator first; the stream stays where it is."""
    import torch

    trainer, state = built.trainer, torch.get_rng_state()
    real, seen = trainer.data_collator, []
    trainer.data_collator = lambda rows: seen.append([dict(row) for row in rows]) or real(rows)
    try:
        next(iter(trainer.get_train_dataloader().base_dataloader))  # accelerate's own would count as begun
    finally:
        trainer.data_collator = real
        torch.set_rng_state(state)
    return seen[0]


def _both(built: Any) -> tuple[list[str], list[str]]:
    rows = held(built)
    expected = list(itertools.islice(from_files(built), len(rows)))
    names = _names(built, expected[0])
    return [_key(row, names) for row in rows], [_key(row, names) for row in expected]


def from_files(built: Any) -> Iterator[dict[str, Any]]:
    """Rows of the files, as the configuration names them, in the order in which `datasets` draws them."""
    from datasets import IterableDataset
    from datasets.iterable_dataset import ExamplesIterable

    from soup.data.stream import BUFFER_ROWS, Stream

    stream, seed = Stream(_settings(built)), built.config.training.data_seed

    def once() -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(row for _, row in stream.once())

    for epoch in itertools.count():
        rows = IterableDataset(ex_iterable=ExamplesIterable(once, {}))
        yield from rows.shuffle(seed=seed + epoch, buffer_size=BUFFER_ROWS)


def epoch(built: Any) -> Effect:
    """Whether the same rows come again after `max_samples` of them, where that is seen in time."""
    limit = built.config.data.max_samples
    report = built.prepared["train"].report
    key = "data.max_samples"
    if limit is None:
        return Effect(key, None, None, True, "the files are read to their ends")
    rows = limit if report.sampled else min(limit, report.rows)
    if rows > COUNTED:
        return Effect(key, limit, limit, True, f"rows after the first {COUNTED} are not looked at")
    drawn = list(itertools.islice(built.trainer.train_dataset, 2 * rows))
    names = _names(built, next(from_files(built)))
    first, second = (Counter(_key(row, names) for row in part) for part in (drawn[:rows], drawn[rows:]))
    ok = first == second
    return Effect(key, limit, rows if ok else "more rows", ok, f"after {rows} rows the same rows come again")


def _settings(built: Any) -> Any:
    from soup.data.settings import Settings
    from soup.inputs import data_arguments

    return Settings(**data_arguments(built.config, built.model_folder))


def _names(built: Any, row: Mapping[str, Any]) -> list[str]:
    """Columns that the trainer kept as they were: a reward model's have prompt and answer in one."""
    whole = built.config.task.head == "score"
    kept = [name for name in row if name in held(built).column_names]
    return [name for name in kept if not (whole and name.endswith("_ids"))]


def _key(row: Mapping[str, Any], names: Sequence[str] | None = None) -> str:
    return repr([row[name] for name in (names or sorted(row))])
