"""What a rule is: a condition over facts, and what to tell who meets it. Rules are data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from soup.errors import Problem

_UNKNOWN = object()


@dataclass(frozen=True)
class Not:
    """Any known value but these."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any):
        object.__setattr__(self, "values", values)

    def __call__(self, value: Any) -> bool:
        return value not in self.values

    def __str__(self) -> str:
        return " not " + " or ".join(word(value) for value in self.values)


@dataclass(frozen=True)
class OneOf:
    """One of these values."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any):
        object.__setattr__(self, "values", values)

    def __call__(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return "=" + "|".join(word(value) for value in self.values)


@dataclass(frozen=True)
class Above:
    """A number greater than this."""

    bound: float

    def __call__(self, value: Any) -> bool:
        return isinstance(value, int | float) and value > self.bound

    def __str__(self) -> str:
        return f" above {self.bound:g}"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`key` is the one to blame."""

    key: str
    when: Mapping[str, Any]
    why: str
    fix: str
    source: str | None = None

    def holds(self, facts: Mapping[str, Any]) -> bool:
        return self.missed(facts) == 0

    def missed(self, facts: Mapping[str, Any]) -> int:
        """How many of its conditions do not hold; a fact that is not known counts as one."""
        missed = 0
        for key, condition in self.when.items():
            value = facts.get(key, _UNKNOWN)
            met = condition(value) if callable(condition) else value == condition
            missed += value is _UNKNOWN or not met
        return missed

    def condition(self) -> str:
        """The condition as people read it: `optim=galore and lora not none`."""
        return " and ".join(
            f"{key}{condition if callable(condition) else '=' + word(condition)}"
            for key, condition in self.when.items()
        )

    def problem(self, facts: Mapping[str, Any]) -> Problem:
        value = facts.get(self.key)
        return Problem(
            key=self.key,
            value=word(value) if isinstance(value, bool) else value,
            why=self.why,
            fix=self.fix,
            source=self.source,
        )


def word(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
