"""Text files, plain or gzipped: their lines, their encoding, and the documents in them."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from soup.errors import Problem, Refused

# A line that holds nothing but one of these separates two documents of a text file.
_SEPARATOR = re.compile(rb"\s*(<\|[a-z_]+\|>|</s>|<eos>)\s*")


def open_bytes(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb")


def lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Lines without their line ends (LF or CRLF) and without a byte order mark, from number 1."""
    with open_bytes(file) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                check_text(file, line)
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield number, line.rstrip(b"\r\n")


def check_text(file: Path, head: bytes) -> None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Refused(
            Problem(
                key=str(file),
                why="is UTF-16; UTF-8 is needed",
                fix=f"iconv -f UTF-16 -t UTF-8 {file} > utf8{file.suffix}",
            )
        )
    if b"\0" in head[:65536]:
        raise Refused(Problem(key=str(file), why="is binary, not text", fix="name a data file"))


def decode(file: Path, raw: bytes, line: int = 1) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = line + raw.count(b"\n", 0, error.start)
        raise Refused(
            Problem(
                key=f"{file}:{at}",
                why=f"is not UTF-8 (byte {raw[error.start]:#04x})",
                fix="convert the file to UTF-8",
            )
        ) from error


def documents(file: Path) -> Iterator[tuple[int, Any]]:
    """The documents of a text file.

    Where a line holds only an end-of-text mark (`<|endoftext|>`, `</s>`), such lines separate documents; else
    blank lines do; a file with neither has one document a line, as dumps of articles have. Markdown, whose
    blank lines separate paragraphs, is one document a file unless it has marks.
    """
    marked = blank = False
    last = 0
    for number, line in lines(file):
        marked = marked or bool(_SEPARATOR.fullmatch(line))
        blank = blank or (last > 0 and number > last + 1 and bool(line.strip()))
        last = number if line.strip() else last
    whole = not marked and ".md" in file.suffixes
    by_line = not marked and not blank and not whole
    document: list[bytes] = []
    start = 1

    def finished() -> Iterator[tuple[int, Any]]:
        if any(line.strip() for line in document):
            yield start, {"text": decode(file, b"\n".join(document).strip(b"\n"), start)}
        document.clear()

    for number, line in lines(file):
        ends = _SEPARATOR.fullmatch(line) if marked else not line.strip()
        if ends and not whole:
            yield from finished()
        elif document or line.strip():
            start = start if document else number
            document.append(line)
            if by_line:
                yield from finished()
    yield from finished()
