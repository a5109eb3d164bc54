"""A row of a data file, and what is said of one that cannot be used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soup.errors import Problem


class BadRow(Exception):
    """One row's fault: `why` it cannot be used and the `fix`. Whoever knows the file and line adds them."""

    def __init__(self, why: str, fix: str):
        super().__init__(f"{why}; {fix}")
        self.why = why
        self.fix = fix


@dataclass(frozen=True)
class Row:
    """One row as it stands in its file.

    `source` is the path as the user gave it. `line` counts from 1: the line on which the row starts, or in
    a Parquet file, which has no lines, the row's number.
    """

    source: str
    line: int
    fields: dict[str, Any]

    @property
    def where(self) -> str:
        return place(self.source, self.line)


@dataclass(frozen=True)
class BadRowReport:
    """A row that was not usable, with its place."""

    source: str
    line: int
    why: str
    fix: str

    @classmethod
    def of(cls, row: Row, error: BadRow) -> BadRowReport:
        return cls(row.source, row.line, error.why, error.fix)

    def problem(self, otherwise: str) -> Problem:
        """`otherwise`: the setting that passes over such rows, offered beside the fix."""
        return Problem(key=place(self.source, self.line), why=self.why, fix=f"{self.fix}; or {otherwise}")


def place(source: str, line: int) -> str:
    return f"{source}:row {line}" if source.endswith(".parquet") else f"{source}:{line}"


def describe(value: Any) -> str:
    """A value of the wrong type, as a user reads it: `null`, `a number (3)`, `a list of 2`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        # An integer of thousands of digits cannot even be printed: sys.set_int_max_str_digits.
        shown = str(value) if isinstance(value, float) or value.bit_length() < 128 else "very large"
        return f"a number ({shown})"
    if isinstance(value, str):
        return "an empty text" if not value.strip() else "a text"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with {names(value)}"
    return f"a {type(value).__name__}"


def names(fields: dict[Any, Any]) -> str:
    """The names of a row's columns, the first of them, in letters that any terminal prints."""
    shown = [str(name)[:40].encode("utf-8", "backslashreplace").decode() for name in list(fields)[:10]]
    return ", ".join(shown) + (", ..." if len(fields) > 10 else "") or "nothing in it"


def number(row: Row, name: str) -> float:
    """A column's finite number; of a CSV file, where all is text, the number that the text says. Raises BadRow."""
    if name not in row.fields:
        raise BadRow(
            f"`{name}` is missing (columns here: {names(row.fields)})", f"give every row a number as `{name}`"
        )
    value = row.fields[name]
    text = isinstance(value, str) and {".csv", ".tsv"} & set(Path(row.source).suffixes)
    try:
        found = (
            float(value)
            if text or isinstance(value, int | float) and not isinstance(value, bool)
            else math.nan
        )
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        shown = repr(value[:40]) if isinstance(value, str) else describe(value)
        raise BadRow(
            f"`{name}` is {shown}, not a finite number", "write a number there, the larger the harder"
        )
    return found
