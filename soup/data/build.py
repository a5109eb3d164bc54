"""From the rows of one source to encoded rows, with an account of every row that did not make it."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from soup.data.encode import Encoded
from soup.data.formats import COLUMNS, detect
from soup.data.report import BAD_KEPT
from soup.data.rows import BadRow, BadRowReport, Row, names, number
from soup.data.settings import Settings
from soup.data.shapes import TOKENISED, to_shape
from soup.errors import Problem, Refused

_LOOKED_AT = 100  # rows by whose majority the format is told
_CHUNK_ROWS, _CHUNK_CHARACTERS = 1000, 4_000_000  # tokenised together; offsets take some 100 bytes a token
_AT_ONCE_ROWS = 64  # the same of a stream, which is refused at the first row that is wrong


@dataclass
class Tally:
    """What happened to the rows of one source; filled while they pass."""

    format: str = ""
    read: int = 0
    kept: int = 0  # usable rows that were handed on
    bad_total: int = 0
    bad: list[BadRowReport] = field(default_factory=list)
    too_long_total: int = 0
    too_long: list[BadRowReport] = field(default_factory=list)
    skipped: int = 0
    dropped_nothing_left: int = 0
    longest: int = 0

    def add_bad(self, report: BadRowReport) -> None:
        self.bad_total += 1
        if len(self.bad) < BAD_KEPT:
            self.bad.append(report)

    @property
    def lost(self) -> int:
        return self.bad_total + self.skipped + self.dropped_nothing_left

    def problems(self, settings: Settings) -> list[Problem]:
        """What the rows have wrong that the settings refuse."""
        found = []
        if self.bad_total and settings.on_bad_row == "refuse":
            found += [report.problem("data.on_bad_row=skip") for report in self.bad]
            found.append(
                Problem(
                    key="data.on_bad_row",
                    value="refuse",
                    why=f"bad rows: {self.bad_total}",
                    fix="repair them, or data.on_bad_row=skip leaves them out and counts them",
                )
            )
        if self.too_long_total:
            found += [report.problem("data.on_too_long=truncate or skip") for report in self.too_long]
            found.append(
                Problem(
                    key="data.on_too_long",
                    value="refuse",
                    why=f"rows longer than data.max_length={settings.max_length}: {self.too_long_total}; "
                    f"the longest has {self.longest} tokens",
                    fix=f"data.max_length={self.longest}, or data.on_too_long=truncate or skip",
                )
            )
        return found


def counted(rows: Iterable[Row | BadRowReport], tally: Tally) -> Iterator[Row | BadRowReport]:
    for row in rows:
        tally.read += 1
        yield row


def head(rows: Iterator[Row | BadRowReport]) -> list[Row | BadRowReport]:
    """The first _LOOKED_AT rows that can be read, and the bad ones among them."""
    head: list[Row | BadRowReport] = []
    readable = 0
    for row in rows:
        head.append(row)
        readable += isinstance(row, Row)
        if readable == _LOOKED_AT:
            break
    return head


def format_of(settings: Settings, head: list[Row | BadRowReport], split: str, files: Sequence[Path]) -> str:
    """The format given, or that of most of the first rows; checked against the shape that the task needs."""
    rows = [row for row in head if isinstance(row, Row)]
    if settings.format != "auto":
        settings.check_accepted(settings.format, split, files)
        return settings.format
    seen = Counter(format for format in (detect(row.fields) for row in rows) if format is not None)
    if seen:
        format = seen.most_common(1)[0][0]
        settings.check_accepted(format, split, files)
        return format
    if rows:
        known = "; ".join(f"{format}: {columns}" for format, columns in COLUMNS.items())
        raise Refused(
            Problem(
                key=rows[0].where,
                why="the row is of no known format; its columns are " + names(rows[0].fields),
                fix=f"rename the columns, or give data.format. Known: {known}",
            )
        )
    return settings.format


def usable(
    settings: Settings,
    rows: Iterable[Row | BadRowReport],
    tally: Tally,
    *,
    numbers: Sequence[str],
    style: list[type],
    at_once: bool,
) -> Iterator[Encoded]:
    """Encoded rows with the `numbers` of each beside its tokens; `style` and `at_once` as a `Source` has them."""
    made = examples(settings, rows, tally, numbers=numbers, style=style)
    for chunk in _chunks(made, _AT_ONCE_ROWS if at_once else _CHUNK_ROWS):
        with threads(settings.num_proc):
            results = settings.encoder.encode_batch(settings.shape, [example for _, example in chunk])
        for (row, _), result in zip(chunk, results, strict=True):
            if isinstance(result, BadRow):
                tally.add_bad(BadRowReport.of(row, result))
                continue
            tally.longest = max(tally.longest, result.full_length)
            if result.too_long and settings.on_too_long == "skip":
                tally.skipped += 1
            elif result.too_long and settings.on_too_long == "refuse":
                tally.too_long_total += 1
                if len(tally.too_long) < BAD_KEPT:
                    why = f"{result.full_length} tokens; data.max_length={settings.max_length}"
                    tally.too_long.append(BadRowReport(row.source, row.line, why, "shorten it"))
            elif result.nothing_left:
                tally.dropped_nothing_left += 1
            elif numbers:
                beside = {name: number(row, name) for name in numbers}
                yield replace(result, columns=result.columns | beside)
            else:
                yield result
        if at_once and (problems := tally.problems(settings)):
            raise Refused(problems)
    if at_once and (problems := tally.problems(settings)):  # of rows that were not even encoded
        raise Refused(problems)


def examples(
    settings: Settings,
    rows: Iterable[Row | BadRowReport],
    tally: Tally,
    *,
    numbers: Sequence[str],
    style: list[type],
) -> Iterator[tuple[Row, dict[str, Any]]]:
    """The examples of each good row, in the task's shape; the bad rows are counted."""
    for row in rows:
        if isinstance(row, BadRowReport):
            tally.add_bad(row)
            continue
        try:
            found = to_shape(row.fields, tally.format, settings.shape)
            _check_same(settings, row, tally.format)
            for name in numbers:
                number(row, name)
            if settings.shape not in TOKENISED:
                style[:] = style or [type(found[0]["prompt"])]
                _check_style(style[0], found[0]["prompt"])
        except BadRow as error:
            tally.add_bad(BadRowReport.of(row, error))
            continue
        for example in found:
            yield row, example


def _check_same(settings: Settings, row: Row, format: str) -> None:
    seen = detect(row.fields)
    if settings.format == "auto" and seen not in (format, None):
        raise BadRow(
            f"the row is of format {seen} among rows of format {format}",
            f"give each format a file of its own, or data.format={format} if {format} rows look so",
        )


def _check_style(style: type, prompt: Any) -> None:
    """TRL reads texts and messages in different ways, and takes the first row's for all."""
    if not isinstance(prompt, style):
        kinds = {str: "texts", list: "messages"}
        raise BadRow(
            f"the row is written as {kinds[type(prompt)]}, those before it as {kinds[style]}",
            "write all rows of the data in one of the two ways",
        )


def _chunks(examples: Iterable[tuple[Row, Any]], rows: int) -> Iterator[list[tuple[Row, Any]]]:
    chunk: list[tuple[Row, Any]] = []
    characters = 0
    for row, example in examples:
        chunk.append((row, example))
        characters += _characters(example)
        if len(chunk) == rows or characters > _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _characters(example: dict[str, Any]) -> int:
    sides = (
        example.get(name, "") for name in ("text", "messages", "prompt", "completion", "chosen", "rejected")
    )
    return sum(
        len(side) if isinstance(side, str) else sum(len(turn["content"]) for turn in side) for side in sides
    )


def nothing_left(settings: Settings, split: str, files: Sequence[Path], tally: Tally) -> Problem:
    where = ", ".join(map(str, files[:3]))
    if tally.read == 0:
        return Problem(
            key=f"data.{split}", value=where, why="there is no row in it", fix="name files with rows"
        )
    return Problem(
        key=f"data.{split}",
        value=where,
        why=f"no row is left of {tally.read}: {tally.bad_total} bad, {tally.skipped} too long and skipped, "
        f"{tally.dropped_nothing_left} with nothing to learn from within "
        f"data.max_length={settings.max_length}",
        fix="raise data.max_length, or look at the rows with `soup data`",
    )


def group_digest(shape: str, columns: dict[str, Any]) -> bytes:
    """Equal for rows that must not be parted between training and evaluation: the same tokens, or prompt."""
    if shape in TOKENISED:
        raw = columns["input_ids"].tobytes() + b"|" + columns["labels"].tobytes()
    else:
        raw = json.dumps(columns["prompt"]).encode()
    return hashlib.blake2b(raw, digest_size=16).digest()


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Tokenise on `number` threads: rayon reads this when the process first tokenises, and never again."""
    before = os.environ.get("RAYON_NUM_THREADS")
    os.environ["RAYON_NUM_THREADS"] = str(number)
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAYON_NUM_THREADS"]
        else:
            os.environ["RAYON_NUM_THREADS"] = before
