"""The rows that the trainer holds, and what its collator makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from soup.effects import Effect, same
from soup.effects.sources import held, is_stream, streamed_rows

PROMPTS = 1000  # that are tokenised to see how long they are


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
        limit = data["max_samples"]
        yield Effect(
            "data.max_samples", limit, trained, limit is None or trained <= limit, "rows to train on"
        )
    held_out = trainer.eval_dataset
    wanted = "eval" in built.prepared
    ok = (held_out is not None) == wanted and (not wanted or intact(built, held_out, built.prepared["eval"]))
    count = 0 if held_out is None else len(held_out)
    yield Effect("data.eval", data["eval"], f"{count} rows", ok, "rows of the trainer's eval_dataset")
    share = count / (count + trained) if trained else 0.0
    asked = data["eval_fraction"]
    near = asked == 0 or abs(share - asked) <= max(0.1 * asked, 2 / (count + trained))
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
    trainer = built.trainer
    whole = built.config.task.head == "score"
    ordered = entry.split != "train" or trainer.args.train_sampling_strategy != "sequential"
    if "seq_lengths" in dataset.column_names:
        return _same_documents(dataset, table, built.config.data.max_length)
    if "input_ids" in table.column_names:
        return dataset._indices is None and dataset.data.table.equals(table)
    names = [n for n in table.column_names if n in dataset.column_names]
    names = [n for n in names if not (whole and n.endswith("_ids"))]
    held = dataset.with_format("arrow")[:].select(names)
    table = table.select(names).cast(held.schema)
    if ordered:
        return bool(names) and held.equals(table)
    return bool(names) and Counter(map(repr, held.to_pylist())) == Counter(map(repr, table.to_pylist()))


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
        longest = max(
            int(mask.sum(-1).max()) for name, mask in batch.items() if name.endswith("attention_mask")
        )
        how = "the longest rows the trainer holds, as its collator gives them"
    how += f"; {report.truncated} rows were truncated" + (" of the first" if report.sampled else "")
    yield Effect("data.max_length", data.max_length, longest, longest <= data.max_length, how)
    lost = f"{report.truncated} truncated, {report.skipped + report.dropped_nothing_left} left out"
    ok = data.on_too_long == "truncate" or report.truncated == 0
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
        yield _packed_labels(built)
        return
    # The first rows, and the longest, which a collator would cut.
    examples = [rows[i] for i in dict.fromkeys([*range(min(3, len(rows))), *_longest(rows)])]
    collated = trainer.data_collator([dict(example) for example in examples])
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
    from soup.effects.task import undisturbed

    asked = built.config.training.packing
    rows = held(built)
    key = "training.packing"
    if "seq_lengths" not in rows.column_names:
        yield same(
            key, asked, bool(getattr(built.trainer, "padding_free", False)), "one document a row, padded"
        )
        return
    counts = [len(lengths) for lengths in rows[:PROMPTS]["seq_lengths"]]
    if max(counts) == 1:
        yield same(key, asked, True, f"{len(rows)} rows, each filled by one document")
        return
    example = rows[counts.index(max(counts))]
    first = example["seq_lengths"][0]
    changed = {**example, "input_ids": [*example["input_ids"]]}
    changed["input_ids"][0] = example["input_ids"][0] ^ 1  # another token of the vocabulary
    with undisturbed(built):
        logits = []
        for one in (example, changed):
            batch = built.trainer._prepare_inputs(built.trainer.data_collator([dict(one)]))
            batch.pop("labels")
            logits.append(built.model(**batch).logits[0].float())
        moved = (logits[0] - logits[1]).abs().amax(-1)
    apart = bool(moved[:first].max() > 0) and bool(moved[first:].max() <= 1e-5 * logits[0].abs().max())
    how = (
        f"{len(rows)} rows hold {sum(counts)} documents; a changed token moves logits of its own by "
        f"{float(moved[:first].max()):.2g} and of the others by {float(moved[first:].max()):.2g}"
    )
    yield Effect(key, asked, apart or "documents see one another", asked and apart, how)


def _same_documents(dataset: Any, table: Any, max_length: int) -> bool:
    """Packed rows hold the tokens and labels that were prepared; those that fit a row are there whole."""
    from soup.effects.task import documents

    def parts(row: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(row["input_ids"]), tuple(row["labels"])

    held = Counter(parts(part) for row in dataset for part in documents(row))
    made = Counter(parts(row) for row in table.to_pylist())
    whole = Counter({one: count for one, count in made.items() if len(one[0]) <= max_length})
    tokens = [sum(len(one[0]) * count for one, count in each.items()) for each in (held, made)]
    return not whole - held and tokens[0] == tokens[1]


def _packed_labels(built: Any) -> Effect:
    """Labels of a packed batch: those of its documents, but for the first token of each, which nothing predicts."""
    from soup.effects.task import documents

    rows = built.trainer.train_dataset
    examples = [rows[i] for i in range(min(3, len(rows)))]
    collated = built.trainer.data_collator([dict(example) for example in examples])
    parts = [part for example in examples for part in documents(example)]
    ids = [number for part in parts for number in part["input_ids"]]
    labels = [number for part in parts for number in (-100, *part["labels"][1:])]
    right = collated["input_ids"][0].tolist() == ids and collated["labels"][0].tolist() == labels
    learnt = sum(label != -100 for label in labels)
    asked = built.config.tree["data"]["format"]
    found = built.prepared["train"].report.format
    how = f"{learnt} of {len(ids)} tokens are learnt in {len(parts)} documents of {len(examples)} packed rows"
    return Effect(
        "data.format", asked, found if right else "another mask", right and asked in ("auto", found), how
    )
