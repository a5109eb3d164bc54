"""Rows that are read, tokenised and drawn while training: no file of them is written."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from soup.data.mix import mixed, shuffled
from soup.data.settings import Settings
from soup.data.sources import sources, unused
from soup.errors import Refused

BUFFER_ROWS = 1000  # tokenised, of which the next row is drawn


@dataclass(frozen=True)
class Stream:
    """The training rows of `settings`, which its files give again in each epoch."""

    settings: Settings

    def drawn(self) -> Iterator[dict[str, Any]]:
        """Rows without end. Epoch e is drawn from `split_seed + e`; the next epoch fills no gap of the one before.

        Raises Refused at the first row that the settings refuse, or where a source gives none.
        """
        for epoch in itertools.count():
            rows = (row for _, row in self.once())
            yield from shuffled(rows, buffer_rows=BUFFER_ROWS, seed=self.settings.split_seed + epoch)

    def once(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of one epoch, as they lie in the files or as their mix takes them, with their sources' numbers."""
        settings = self.settings
        given = sources(settings, "train", at_once=True)
        taken = [0] * len(given)
        for number, row in mixed([iter(source) for source in given], settings.shares("train")):
            if sum(taken) == settings.max_samples:
                break
            taken[number] += 1
            yield number, plain(row.columns)
        if problems := unused(settings, "train", given, taken):
            raise Refused(problems)

    def first(self, rows: int) -> list[dict[str, Any]]:
        return [row for _, row in itertools.islice(self.once(), rows)]


def plain(columns: dict[str, Any]) -> dict[str, Any]:
    """Lists for arrays."""
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in columns.items()}
