"""Plain tables, and numbers as people read them. Quick for thousands of lines, where rich takes seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from soup.record import Run


def lines(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Aligned columns; those without any content are left out."""
    cells = [[str(cell) for cell in row] for row in rows]
    kept = [column for column in range(len(header)) if any(row[column] for row in cells)]
    table = [[header[column] for column in kept], *([row[column] for column in kept] for row in cells)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def size(count: float | None) -> str:
    """Bytes, in decimal units."""
    if count is None:
        return "-"
    from rich.filesize import decimal

    return decimal(round(count))


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def summary(run: Run) -> str:
    """What a finished run came to."""
    result = run.result() or {}
    shown = {
        key: result[key] for key in ("step", "loss", "reward", "eval_loss") if result.get(key) is not None
    }
    return ", ".join(f"{key} {value:.4g}" for key, value in shown.items())
