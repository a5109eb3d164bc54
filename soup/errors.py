"""What soup says when it refuses: every problem names its key, value, reason and fix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One reason to refuse, as a user reads it.

    `key` is a full configuration key (`lora.r`), a file with a line (`rows.jsonl:17`) or a command line
    word; `value` is what was found there, or `None` where there is nothing to show.
    """

    key: str
    why: str
    fix: str
    value: Any = None
    source: str | None = None

    def __str__(self) -> str:
        where = self.key if self.value is None else f"{self.key}={_short(self.value)}"
        text = f"{where}: {self.why}"
        if self.source:
            text += f" [{self.source}]"
        return f"{text}\n    fix: {self.fix}"


class Refused(Exception):
    """The request cannot be carried out. Holds every problem found, so that all are reported at once."""

    def __init__(self, problems: Problem | Iterable[Problem]):
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        if not self.problems:
            raise ValueError("Refused needs at least one problem")
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RecordError(Exception):
    """A run folder or cache entry that cannot be read or written; `__cause__` has the system's error."""


def _short(value: Any, limit: int = 120) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
