"""Rows from JSON, JSON lines, CSV, TSV, Parquet and text files, each with its file and line.

A row that cannot be read is reported and reading goes on. A file that cannot be read past some point (binary
junk, a broken JSON array, an unclosed CSV quote) is refused as a whole: to pass over the rest of a file in
silence would train on less than what was asked for.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from soup.data.files import resolve_files
from soup.data.lines import check_text, decode, documents, lines, open_bytes
from soup.data.rows import BadRow, BadRowReport, Row, describe
from soup.errors import Problem, Refused

__all__ = ["BadRow", "BadRowReport", "Row", "read_rows", "resolve_files"]

_SPACE = re.compile(r"[ \t\r\n]*")
# CSV cells are text; in these columns they are read as JSON, since a conversation has no other CSV form.
_NESTED_COLUMNS = ("messages", "conversations", "history")


def read_rows(files: Iterable[Path]) -> Iterator[Row | BadRowReport]:
    """Every row of `files`, in order. Raises Refused for a file that cannot be read."""
    for file in files:
        source = str(file)
        try:
            for line, fields in _reader(file)(file):
                if isinstance(fields, BadRow):
                    yield BadRowReport(source, line, fields.why, fields.fix)
                elif not isinstance(fields, dict):
                    yield BadRowReport(
                        source,
                        line,
                        f"the row is {describe(fields)}, not an object",
                        'write it as {"column": value, ...}',
                    )
                else:
                    yield Row(source, line, fields)
        except (OSError, EOFError, zlib.error) as error:
            raise Refused(
                Problem(key=source, why=f"cannot be read: {error}", fix="check the file and its permissions")
            ) from error


def _reader(file: Path) -> Callable[[Path], Iterator[tuple[int, Any]]]:
    suffix = Path(file.stem).suffix if file.suffix.lower() == ".gz" else file.suffix
    return READERS[suffix.lower()]


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in lines(file):
        if line.strip():
            yield number, _json(line)


def _json(raw: bytes | str) -> Any:
    """A JSON value, or the BadRow that says why there is none."""
    try:
        return json.loads(raw.decode() if isinstance(raw, bytes) else raw)
    except json.JSONDecodeError as error:
        return BadRow(f"malformed JSON: {error.msg} at character {error.pos + 1}", "repair the line")
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 at byte {error.start + 1} of the line", "convert the file to UTF-8")
    except RecursionError:
        return BadRow("JSON nested too deeply", "flatten it")
    except ValueError as error:  # an integer of more digits than Python reads
        return BadRow(f"malformed JSON: {error}", "repair the line")


def _json_file(file: Path) -> Iterator[tuple[int, Any]]:
    """An array of rows; or JSON lines under the name .json, as many data sets have them; or one object."""
    first = next((line.lstrip() for _, line in lines(file) if line.strip()), b"")
    if not first.startswith(b"[") and not isinstance(_json(first), BadRow):
        yield from _json_lines(file)
        return
    with open_bytes(file) as stream:
        text = decode(file, stream.read())
    if not first.startswith(b"["):
        value = _json(text)
        yield from _json_lines(file) if isinstance(value, BadRow) else [(1, value)]
        return
    try:
        yield from _array(text)
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise Refused(
            Problem(
                key=f"{file}{line}",
                why=f"malformed JSON, which cannot be read past this point: {getattr(error, 'msg', error)}",
                fix="repair it, or write a row a line as .jsonl, where data.on_bad_row=skip passes over one",
            )
        ) from error


def _array(text: str) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON array, each with the line on which it starts."""
    raw_decode = json.JSONDecoder().raw_decode

    def after_space(at: int) -> int:
        return _SPACE.match(text, at).end()

    at = after_space(after_space(0) + 1)
    line, counted = 1, 0
    more = text[at : at + 1] != "]"
    while more:
        line, counted = line + text.count("\n", counted, at), at
        value, at = raw_decode(text, at)
        yield line, value
        at = after_space(at)
        more = text[at : at + 1] == ","
        if more:
            at = after_space(at + 1)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("expected ',' or ']' after a row", text, at)
    end = after_space(at + 1)
    if end < len(text):
        raise json.JSONDecodeError("text after the array's end", text, end)


def _csv(file: Path, delimiter: str = ",") -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(sys.maxsize)  # the module's own limit of 131072 characters is no limit on documents
    with open_bytes(file) as stream:
        check_text(file, stream.read(65536))
        stream.seek(0)
        text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            yield from _csv_rows(file, reader)
        except UnicodeDecodeError as error:
            raise Refused(
                Problem(
                    key=f"{file}:{reader.line_num + 1}",
                    why="is not UTF-8 here or soon after",
                    fix="convert the file to UTF-8",
                )
            ) from error


def _csv_rows(file: Path, reader: Any) -> Iterator[tuple[int, Any]]:
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise Refused(
                    Problem(
                        key=f"{file}:{line}",
                        why="a quote opens here and never closes",
                        fix="close the quote, and double quotes inside cells",
                    )
                ) from error
            yield line, BadRow(f"malformed CSV: {error}", "quote the cell, and double quotes inside it")
            continue
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header):
                raise Refused(
                    Problem(
                        key=f"{file}:{line}",
                        value=",".join(header),
                        why="two columns have one name",
                        fix="rename one",
                    )
                )
        elif len(cells) != len(header):
            yield (
                line,
                BadRow(
                    f"{len(cells)} cells where the header has {len(header)}",
                    "quote cells that contain the separator or a line end",
                ),
            )
        else:
            yield line, _cells(dict(zip(header, cells, strict=True)))


def _cells(fields: dict[str, str]) -> dict[str, Any] | BadRow:
    row: dict[str, Any] = {}
    for name, cell in fields.items():
        if name in _NESTED_COLUMNS and cell.strip():
            value = _json(cell)
            if isinstance(value, BadRow):
                return BadRow(
                    f"`{name}` is not JSON: {value.why}", "write the conversation as JSON in the cell"
                )
            row[name] = value
        else:
            row[name] = cell
    return row


def _tsv(file: Path) -> Iterator[tuple[int, Any]]:
    return _csv(file, "\t")


def _parquet(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1000):
                for fields in batch.to_pylist():
                    number += 1
                    yield number, fields
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise Refused(
            Problem(
                key=str(file),
                why=f"is not a Parquet file that can be read: {error}",
                fix="write it again, or convert it to .jsonl",
            )
        ) from error


READERS = {
    ".json": _json_file,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".txt": documents,
    ".md": documents,
    ".text": documents,
}
