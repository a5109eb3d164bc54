"""The sources of one split as they pass: which rows each gives to the mix, and what is wrong with any of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

from soup.data.build import Tally, counted, examples, format_of, head, nothing_left, usable
from soup.data.encode import Encoded
from soup.data.mix import mixed
from soup.data.read import read_rows
from soup.data.report import BAD_KEPT
from soup.data.rows import BadRowReport, Row
from soup.data.settings import Settings
from soup.errors import Problem, Refused

_LEAST = 100  # rows of each source that a sample looks at


class Source:
    """The usable rows of one source, in order; `tally` fills while they pass, and `problems` holds what ended them.

    `limit`: rows that are read, at most. `at_once`: what the settings refuse of a row is raised there and then, since
    nobody sees the end of a stream; else it is in `tally` at the end. `style` is shared by all sources.
    """

    def __init__(
        self,
        settings: Settings,
        split: str,
        number: int,
        *,
        style: list[type],
        limit: int | None = None,
        at_once: bool = False,
    ):
        self.settings, self.split, self.style = settings, split, style
        self.files = settings.sources[split][number]
        self.name = settings.names(split)[number]
        self.numbers = settings.numbers if split == "train" else ()
        self.limit, self.at_once = limit, at_once
        self.tally = Tally()
        self.problems: tuple[Problem, ...] = ()
        self.ended = False
        self._rows = counted(read_rows(self.files), self.tally)

    def __iter__(self) -> Iterator[Encoded]:
        try:
            for result in usable(
                self.settings,
                self._recognised(),
                self.tally,
                numbers=self.numbers,
                style=self.style,
                at_once=self.at_once,
            ):
                self.tally.kept += 1
                yield result
            self.ended = True
        except Refused as refused:
            if self.at_once:
                raise
            self.problems = refused.problems

    def _recognised(self) -> Iterator[Row | BadRowReport]:
        """The rows up to the limit, once their format is known."""
        first = head(self._rows)
        self.tally.format = format_of(self.settings, first, self.split, self.files)
        return itertools.islice(itertools.chain(first, self._rows), self.limit)

    def untokenised(self) -> int:
        """Examples that the rows come to, in the place of encoded rows."""
        rows = self._recognised()
        return sum(
            1 for _ in examples(self.settings, rows, self.tally, numbers=self.numbers, style=self.style)
        )

    def count_rest(self) -> None:
        """Reads what is left, or of a stream one row, to know whether there is more."""
        try:
            for _ in self._rows:
                if self.settings.streams(self.split):
                    return
        except Refused as refused:
            self.problems += refused.problems

    def nothing_left(self) -> Problem:
        return nothing_left(self.settings, self.split, self.files, self.tally)


def sources(
    settings: Settings, split: str, *, limit: int | None = None, at_once: bool = False
) -> list[Source]:
    """The sources of a split, unread. `limit`: rows of all that are read, in proportion to the shares."""
    style: list[type] = []
    number_of = len(settings.sources[split])
    shares = settings.shares(split) or [1 / number_of] * number_of
    limits = [
        None if limit is None else max(min(limit, _LEAST), math.ceil(limit * share)) for share in shares
    ]
    return [
        Source(settings, split, number, style=style, limit=one, at_once=at_once)
        for number, one in enumerate(limits)
    ]


def encoded_rows(settings: Settings, split: str, given: list[Source]) -> Iterator[tuple[int, Encoded]]:
    """The usable rows of a split, in order, at most `max_samples`, each with the number of its source.

    After a source's `limit` its rows are counted and not encoded. Raises Refused at the end for what the settings
    refuse, all problems together, or where a source gives no row.
    """
    taken = [0] * len(given)
    for number, result in mixed([iter(source) for source in given], settings.shares(split)):
        if split == "train" and sum(taken) == settings.max_samples:
            break
        taken[number] += 1
        yield number, result
    else:
        for source in given:
            source.count_rest()
    tally = merged(given)
    problems = [*tally.problems(settings), *(problem for source in given for problem in source.problems)]
    problems = problems or unused(settings, split, given, taken)
    if problems:
        raise Refused(problems)


def count(settings: Settings, split: str) -> list[tuple[int, Tally]]:
    """Examples that each source's rows come to before any is tokenised, and the account of its bad rows."""
    return [(source.untokenised(), source.tally) for source in sources(settings, split)]


def merged(given: Iterable[Source]) -> Tally:
    """What happened to the rows of all sources."""
    tally = Tally()
    for one in (source.tally for source in given):
        tally.read += one.read
        tally.kept += one.kept
        tally.bad_total += one.bad_total
        tally.bad = [*tally.bad, *one.bad][:BAD_KEPT]
        tally.too_long_total += one.too_long_total
        tally.too_long = [*tally.too_long, *one.too_long][:BAD_KEPT]
        tally.skipped += one.skipped
        tally.dropped_nothing_left += one.dropped_nothing_left
        tally.longest = max(tally.longest, one.longest)
    tally.format = " + ".join(dict.fromkeys(source.tally.format for source in given if source.tally.format))
    return tally


def unused(settings: Settings, split: str, given: list[Source], taken: list[int]) -> list[Problem]:
    """A problem for each source that gives no row to the mix."""
    if problems := [source.nothing_left() for source in given if source.ended and not source.tally.kept]:
        return problems
    for source, count in zip(given, taken, strict=True):
        if count:
            continue
        if split == "train" and sum(taken) == settings.max_samples:
            mix = "the mix" if settings.weights else "the sources, which come one after the other,"
            problems.append(
                Problem(
                    key="data.max_samples",
                    value=settings.max_samples,
                    why=f"the first {sum(taken)} rows of {mix} have none of {source.name}",
                    fix="a larger data.max_samples"
                    + ("" if settings.weights else ", or data.weights, which take rows of all in turn"),
                )
            )
        else:
            problems.append(
                Problem(
                    key="data.weights",
                    value=list(settings.weights or ()),
                    why=f"the mix ends, with another source, before it has a row of {source.name}",
                    fix="weights nearer to each other, or more rows",
                )
            )
    return problems
