"""The rows that the trainer holds, and what its collator makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from soup.effects import Effect, same
from soup.effects.sources import brief, epoch, held, is_stream, streamed_rows

PROMPTS = 1000  # that are tokenised to see how long they are
READ_BYTES = 2**25  # of data files, up to which their rows are counted once more


def rows(built: Any) -> Iterator[Effect]:
    """Rows of the trainer's datasets against those that were prepared."""
    data = built.config.tree["data"]
    trainer = built.trainer
    prepared = built.prepared["train"]
    report = prepared.report
    streaming = is_stream(trainer.train_dataset)
    if streaming:
        trained = 0
        yield from streamed_rows(built)
    else:
        trained = len(trainer.train_dataset)
        ok = intact(built, trainer.train_dataset, prepared)
        how = f"the trainer holds {trained} rows, {report.rows} were prepared"
        yield Effect("data.train", data["train"], f"{trained} rows", ok, how)
    held_out = trainer.eval_dataset
    wanted = "eval" in built.prepared
    ok = (held_out is not None) == wanted and (not wanted or intact(built, held_out, built.prepared["eval"]))
    count = 0 if held_out is None else len(held_out)
    yield Effect("data.eval", data["eval"], f"{count} rows", ok, "rows of the trainer's eval_dataset")
    there = trained
    if not streaming and "seq_lengths" in trainer.train_dataset.column_names:
        # packed, each prepared row once, as was seen above
        there, count = report.rows, count and built.prepared["eval"].report.rows
    share = count / (count + there) if there else 0.0
    asked = data["eval_fraction"]
    near = asked == 0 or abs(share - asked) <= max(0.1 * asked, 2 / (count + there))
    yield Effect("data.eval_fraction", asked, round(share, 4), near, f"{count} rows are held out")
    ok = data["format"] in ("auto", report.format)
    yield Effect("data.format", data["format"], report.format, ok, "what the rows were read as")
    yield Effect(
        "data.on_bad_row",
        data["on_bad_row"],
        f"{report.bad_total} bad rows",
        data["on_bad_row"] == "skip" or not report.bad_total,
        "counted in the first rows; the stream is read under the same rule"
        if streaming
        else "counted while reading",
    )
    stored = prepared.open().exists()
    kind, kept = type(trainer.train_dataset).__name__, "has" if stored else "has none of"
    how = f"the trainer has {kind}; the cache {kept} its rows"
    asked = data["streaming"]
    ok = asked == streaming != stored
    yield Effect("data.streaming", asked, asked if ok else not asked, ok, how)


def intact(built: Any, dataset: Any, entry: Any) -> bool:
    """Whether a data set of the trainer's holds what was prepared, of the columns that it kept; a reward model's have
    prompt and answer in one, and KTO's training rows an order of their own."""
    import pyarrow as pa

    if not entry.open().exists():
        return False
    with pa.memory_map(str(entry.open())) as file:
        table = pa.ipc.open_stream(file).read_all()
    if built.config.training.by_difficulty and "difficulty" in table.column_names:
        table = table.drop_columns("difficulty")  # read for the order of rows alone
    trainer = built.trainer
    whole = built.config.task.head == "score"
    ordered = entry.split != "train" or trainer.args.train_sampling_strategy != "sequential"
    if "seq_lengths" in dataset.column_names:
        return _same_documents(built, dataset, table)
    if "input_ids" in table.column_names:
        return dataset._indices is None and dataset.data.table.equals(table)
    names = [n for n in table.column_names if n in dataset.column_names]
    names = [n for n in names if not (whole and n.endswith("_ids"))]
    held = dataset.with_format("arrow")[:].select(names)
    table = table.select(names).cast(held.schema)
    if ordered:
        return bool(names) and held.equals(table)
    return bool(names) and Counter(map(repr, held.to_pylist())) == Counter(map(repr, table.to_pylist()))


def samples(built: Any) -> Iterator[Effect]:
    """Rows that were prepared, against those that the files named by the configuration hold."""
    from soup.data.mix import mixed
    from soup.data.settings import Settings
    from soup.data.sources import count
    from soup.inputs import data_arguments

    if is_stream(built.trainer.train_dataset):
        yield epoch(built)
        return
    settings = Settings(**data_arguments(built.config, built.model_folder))
    size = sum(file.stat().st_size for file in settings.files["train"])
    reports = [built.prepared["train"].report]
    if built.config.data.eval_fraction > 0:
        reports.append(built.prepared["eval"].report)
    kept, limit = sum(report.rows for report in reports), built.config.data.max_samples
    if size > READ_BYTES:
        ok = limit is None or kept <= limit
        how = f"rows prepared; the files of {size // 2**20} MiB were not counted again"
        yield Effect("data.max_samples", limit, kept, ok, how)
        return

    def taken(rows_S: Sequence[int]) -> int:
        """Rows of a mix of sources that have so many."""
        return sum(1 for _ in mixed([iter(range(rows)) for rows in rows_S], settings.shares("train")))

    example_S, tally_S = zip(*count(settings, "train"), strict=True)
    lost_S = [
        source["lost"] - tally.bad_total for source, tally in zip(reports[0].sources, tally_S, strict=True)
    ]
    whole = taken([examples - lost for examples, lost in zip(example_S, lost_S, strict=True)])
    ok = kept == whole if limit is None else kept == min(limit, whole) or (kept == limit < taken(example_S))
    how = f"{kept} rows were prepared; the files hold {sum(example_S)}, of which {max(sum(lost_S), 0)} were left out"
    yield Effect("data.max_samples", limit, None if kept == whole and limit is None else kept, ok, how)


def sequence_length(built: Any) -> Iterator[Effect]:
    """The longest row that the trainer holds."""
    data = built.config.data
    report = built.prepared["train"].report
    rows = held(built)
    if built.config.task.shape == "prompt":
        from soup.model.load import prompt_ids

        longest = max(len(prompt_ids(built.tokenizer, prompt)) for prompt in rows[:PROMPTS]["prompt"])
        how = "the longest prompt, as the trainer's tokenizer gives it"
    elif "seq_lengths" in rows.column_names:
        longest = max(len(rows[i]["input_ids"]) for i in _longest(rows))
        how = "the longest packed row the trainer holds"
    else:
        examples = [rows[i] for i in _longest(rows)]
        batch = built.trainer.data_collator([dict(example) for example in examples])
        masks = [mask for name, mask in batch.items() if name.endswith("attention_mask")]
        longest = (
            max(int(mask.sum(-1).max()) for mask in masks) if masks else int(batch["position_ids"].max()) + 1
        )
        how = "the longest rows the trainer holds, as its collator gives them"
    how += f"; {report.truncated} rows were truncated" + (" of the first" if report.sampled else "")
    yield Effect("data.max_length", data.max_length, longest, longest <= data.max_length, how)
    lost = f"{report.truncated} truncated, {report.skipped + report.dropped_nothing_left} left out"
    did = {
        kind for kind, rows in (("truncate", report.truncated), ("skip", report.skipped)) if rows
    }  # neither, where a longer row is refused
    ok = did <= {data.on_too_long}
    yield Effect("data.on_too_long", data.on_too_long, lost, ok, "counted while tokenising")


def _longest(rows: Any) -> list[int]:
    """Numbers of the rows that have most tokens, one for each column of tokens."""
    import pyarrow.compute as pc

    columns = [name for name in rows.column_names if name.endswith("_ids")]
    table = rows.with_format("arrow")[:]
    lengths = [pc.list_value_length(table.column(name)) for name in columns]
    return list(dict.fromkeys(pc.index(one, pc.max(one)).as_py() for one in lengths))


def label_mask(built: Any) -> Iterator[Effect]:
    """Labels of a batch as the trainer's collator makes it, against the masks that were prepared.

    It stands for `data.format`: the format decides what is learnt.
    """
    trainer = built.trainer
    rows = held(built)
    if "seq_lengths" in rows.column_names:
        yield _packed_labels(built, [rows[i] for i in range(min(3, len(rows)))])
        return
    # The first rows, and the longest, which a collator would cut.
    examples = [rows[i] for i in dict.fromkeys([*range(min(3, len(rows))), *_longest(rows)])]
    collated = trainer.data_collator([dict(example) for example in examples])
    if "attention_mask" not in collated:
        yield _packed_labels(built, examples)
        return
    wrong = 0
    for row, example in enumerate(examples):
        size = len(example["input_ids"])
        same_ids = collated["input_ids"][row].tolist()[:size] == list(example["input_ids"])
        seen = collated["attention_mask"][row].tolist()
        labels = collated["labels"][row].tolist()
        wrong += (
            not same_ids
            or labels[:size] != list(example["labels"])
            or any(one != -100 for one in labels[size:])
            or seen != [1] * size + [0] * (len(seen) - size)
        )
    learnt = int((collated["labels"] != -100).sum())
    total = sum(len(example["labels"]) for example in examples)
    report = built.prepared["train"].report
    asked = built.config.tree["data"]["format"]
    ok = wrong == 0 and learnt > 0 and asked in ("auto", report.format)
    how = f"{learnt} of {total} tokens are learnt in {len(examples)} rows; {wrong} rows have another mask"
    yield Effect("data.format", asked, report.format, ok, how)


def packing(built: Any) -> Iterator[Effect]:
    """Whether documents share rows and do not see one another: a token of one is changed, and the logits looked at."""
    from soup.effects.moe import every_expert
    from soup.effects.undisturbed import undisturbed

    asked = built.config.training.packing
    rows = held(built)
    key = "training.packing"
    if "seq_lengths" not in rows.column_names:
        yield same(
            key, asked, bool(getattr(built.trainer, "padding_free", False)), "one document a row, padded"
        )
        return
    counts = [len(lengths) for lengths in rows[:PROMPTS]["seq_lengths"]]
    tight, told = _filled(built)
    if max(counts) == 1:
        yield Effect(key, asked, True, asked and tight, f"{told}, each filled by one document")
        return
    example = brief(built, rows[counts.index(max(counts))])
    first = example["seq_lengths"][0]
    changed = {**example, "input_ids": [*example["input_ids"]]}
    changed["input_ids"][0] = example["input_ids"][0] ^ 1  # another token of the vocabulary
    with undisturbed(built), every_expert(built):
        logits = []
        for one in (example, changed):
            batch = built.trainer._prepare_inputs(built.trainer.data_collator([dict(one)]))
            batch.pop("labels")
            logits.append(built.model(**batch).logits[0].float())
        moved = (logits[0] - logits[1]).abs().amax(-1)
    apart = bool(moved[:first].max() > 0) and bool(moved[first:].max() <= 1e-5 * logits[0].abs().max())
    how = (
        f"{told}; a changed token moves logits of its document by "
        f"{float(moved[:first].max()):.2g} and of the others by {float(moved[first:].max()):.2g}"
    )
    effective = "documents see one another" if not apart else True if tight else "rows with room left"
    yield Effect(key, asked, effective, asked and apart and tight, how)


def _filled(built: Any) -> tuple[bool, str]:
    """Whether documents lie in as few rows as best fit needs, in the order and the buckets in which they are packed."""
    import numpy as np

    from soup.effects.curriculum import order
    from soup.packing import in_chunks

    rows, size = built.trainer.train_dataset, built.config.data.max_length
    lengths_R = np.array(document_tokens(built))
    needed = sum(in_chunks(lengths_R[sorted(part)].tolist(), size) for part in order(built))
    full = int(lengths_R.sum()) / (len(rows) * size)
    told = f"{len(rows)} rows of {size} tokens hold {len(lengths_R)} documents and are {full:.1%} full; "
    told += f"best fit needs {needed}"
    return len(rows) <= needed, told


def document_tokens(built: Any) -> list[int]:
    """Tokens of each row as prepared: the lengths of its lists of tokens together."""
    import pyarrow as pa
    import pyarrow.compute as pc

    with pa.memory_map(str(built.prepared["train"].open())) as file:
        table = pa.ipc.open_stream(file).read_all()
        columns = [table[name] for name in table.column_names if name.endswith("_ids")]
        return [sum(row) for row in zip(*(pc.list_value_length(c).to_pylist() for c in columns), strict=True)]


def pieces(built: Any, row: Any) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Tokens and labels of a prepared document; cut where it is longer than a row may be."""
    size = built.config.data.max_length
    for start in range(0, len(row["input_ids"]), size):
        yield tuple(row["input_ids"][start : start + size]), tuple(row["labels"][start : start + size])


def _same_documents(built: Any, dataset: Any, table: Any) -> bool:
    """Packed rows hold each document that was prepared, once."""
    from soup.effects.task import documents

    held = Counter(part for row in dataset for one in documents(row) for part in pieces(built, one))
    return held == Counter(part for row in table.to_pylist() for part in pieces(built, row))


def _packed_labels(built: Any, examples: Sequence[Any]) -> Effect:
    """Labels of a batch without padding: those of its documents, but for the first token of each, which nothing
    predicts; and positions that begin again with each."""
    from soup.effects.task import documents

    collated = built.trainer.data_collator([dict(example) for example in examples])
    parts = [part for example in examples for part in documents(example)]
    ids = [number for part in parts for number in part["input_ids"]]
    labels = [number for part in parts for number in (-100, *part["labels"][1:])]
    places = [place for part in parts for place in range(len(part["input_ids"]))]
    wanted = {"input_ids": ids, "labels": labels, "position_ids": places}
    right = all(collated[name][0].tolist() == one for name, one in wanted.items())
    learnt = sum(label != -100 for label in labels)
    asked = built.config.tree["data"]["format"]
    found = built.prepared["train"].report.format
    how = f"{learnt} of {len(ids)} tokens are learnt in {len(parts)} documents of {len(examples)} rows without padding"
    return Effect(
        "data.format", asked, found if right else "another mask", right and asked in ("auto", found), how
    )
