"""Whether rows were read as `data.format` says: what is learnt of the first ones, against the columns it names."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from soup.effects import Effect
from soup.effects.sources import from_files, is_stream

COLUMNS = {  # what a model learns from, of each format, or is asked
    "alpaca": ("output",),
    "sharegpt": ("conversations", "messages", "conversation"),
    "messages": ("messages", "conversations", "conversation"),
    "prompt_completion": ("completion",),
    "preference": ("chosen", "rejected"),
    "unpaired": ("completion",),
    "prompt": ("prompt", "instruction", "conversations"),
    "text": ("text",),
}
ASKED = {
    "alpaca": ("instruction",),
    "prompt_completion": ("prompt",),
}  # where a model is asked, and not shown answers
LOOKED = 8  # of the first rows
READ = 2000  # rows of each source, among which those are looked for; a stream is shuffled within as many
LENGTH = 24  # characters by which a text is known


def learnt(built: Any) -> Iterator[Effect]:
    """What the first rows learn, or are asked, stands in the columns of that format; of a recognised one too, where the
    sources have one format."""
    asked = built.config.data.format
    name = built.prepared["train"].report.format if asked == "auto" else asked
    if name not in COLUMNS:
        return
    names = COLUMNS[name]
    if built.config.task.shape == "prompt":
        names = ASKED.get(name, names)
    shown = [text for row in _rows(built) for text in _learnt(built, row) if text]
    columns = f"in {', '.join(names)} of a row"
    looked = 0
    for fields in _raw(built):
        for said in (said for column in names for said in _texts(fields.get(column))):
            known = _as_decoded(built, said)
            looked += bool(known)
            if known and any(known[:LENGTH] in text or text in known for text in shown):
                yield Effect(
                    "data.format", asked, name, True, f"what is learnt of the first rows stands {columns}"
                )
                return
    if looked:
        how = f"none of the first {len(shown)} texts that are learnt stands {columns}"
        yield Effect("data.format", asked, "other columns", False, how)


def _raw(built: Any) -> Iterator[Mapping[str, Any]]:
    """Rows as they stand in the files of each source."""
    from soup.data.read import read_rows
    from soup.data.rows import Row
    from soup.data.settings import Settings
    from soup.inputs import data_arguments

    for files in Settings(**data_arguments(built.config, built.model_folder)).sources["train"]:
        yield from (row.fields for row in itertools.islice(read_rows(files), READ) if isinstance(row, Row))


def _texts(value: Any) -> Iterator[str]:
    """A text, or those of a list of turns, of which a model may learn some."""
    if isinstance(value, str):
        yield value
    for turn in value if isinstance(value, list) else ():
        if isinstance(turn, Mapping):
            yield from (said for name in ("content", "value") if isinstance(said := turn.get(name), str))


def _as_decoded(built: Any, text: str) -> str:
    """As the tokenizer gives it back: it may know no capital letters."""
    ids = built.tokenizer(text.strip()[: 4 * LENGTH], add_special_tokens=False)["input_ids"]
    return built.tokenizer.decode(ids, skip_special_tokens=True).strip()


def _rows(built: Any) -> Iterable[Mapping[str, Any]]:
    """The first that were prepared, which other probes compare with the trainer's."""
    from soup.data.arrow import first

    if is_stream(built.trainer.train_dataset):
        return itertools.islice(from_files(built), LOOKED)
    return first(built.prepared["train"].open(), LOOKED)


def _learnt(built: Any, row: Mapping[str, Any]) -> Iterator[str]:
    """Texts of what is learnt of a row: by its labels, its answers, or what is asked."""
    if "prompt" in row and "prompt_ids" not in row:
        yield from (text.strip() for text in _texts(row["prompt"]))
    elif "labels" in row:
        ids = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        yield built.tokenizer.decode(ids, skip_special_tokens=True).strip()
    else:
        for name in ("chosen_ids", "rejected_ids", "completion_ids"):
            if name in row:
                yield built.tokenizer.decode(row[name], skip_special_tokens=True).strip()
