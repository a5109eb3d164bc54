"""Data files to cached Arrow files that the trainers read, once for each content and setting.

`<cache>/tokenised/<fingerprint>/` holds `train.arrow`, `eval.arrow` where there is one, and `report.json`.
The Arrow files are IPC streams, as `datasets.Dataset.from_file` maps them. Columns:
  conversation, text   input_ids, labels (int32 lists of equal length; -100 where a token is not learnt)
  preference           prompt, chosen, rejected    texts or lists of {role, content}
  unpaired             prompt, completion, label
  prompt               prompt, and the row's other columns for reward functions
and a column of float64 for each of `Settings.numbers` in the training rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from soup.cache import entry
from soup.data.arrow import part, write
from soup.data.build import Tally, encoded_rows, group_digest, threads
from soup.data.encode import Encoded
from soup.data.report import Report, summarise
from soup.data.settings import Settings
from soup.errors import Problem, RecordError, Refused

SAMPLED_ROWS = 2000


@dataclass(frozen=True)
class Prepared:
    """One split of a complete cache entry."""

    folder: Path
    split: str
    report: Report
    columns: tuple[str, ...]
    fingerprint: str

    def open(self, split: str | None = None) -> Path:
        """The Arrow stream of this split (or another of the entry), for `datasets.Dataset.from_file`."""
        return self.folder / f"{split or self.split}.arrow"


def prepare(**arguments: Any) -> dict[str, Prepared]:
    """The splits of the data, `train` and, where there is one, `eval`, tokenised now or taken from the cache.

    The arguments are those of `soup.data.settings.Settings`, each required. Raises Refused with every problem
    found, and RecordError where the cache cannot be written.
    """
    settings = Settings(**arguments)
    folder = _folder(settings)
    if not folder.is_dir():
        try:
            with entry(folder) as partial:
                if partial is not None:
                    _build(settings, partial)
        except OSError as error:
            raise RecordError(f"{folder}: the cache cannot be written: {error}") from error
    saved = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {
        split: Prepared(
            folder, split, Report.from_dict(one["report"]), tuple(one["columns"]), settings.fingerprint
        )
        for split, one in saved.items()
    }


def fingerprint(**arguments: Any) -> str:
    """Of the data's content, the tokenizer, the template, the settings and the source of `soup.data`."""
    return Settings(**arguments).fingerprint


def lengths(**arguments: Any) -> dict[str, Report]:
    """The reports that `prepare` would give, without writing anything: from the cache, else measured.

    Measures the first SAMPLED_ROWS rows of each split's files; `Report.sampled` says that there are more.
    """
    settings = Settings(**arguments)
    if _folder(settings).is_dir():
        return {split: prepared.report for split, prepared in prepare(**arguments).items()}
    reports: dict[str, Report] = {}

    def measure(split: str) -> None:
        account = _Account(settings, split, SAMPLED_ROWS)
        for _ in account.rows():
            pass
        reports.update(account.reports())

    _each_split(settings, measure)
    return reports


def _folder(settings: Settings) -> Path:
    return Path(settings.cache) / "tokenised" / settings.fingerprint


class _Account:
    """The rows of one file list as they pass, and the reports on them."""

    def __init__(self, settings: Settings, split: str, limit: int | None = None):
        self.settings, self.split, self.limit = settings, split, limit
        self.tally = Tally()
        self.lengths: list[int] = []
        self.learnt: list[int] = []
        self.truncated: list[bool] = []
        self.groups: list[bytes] = []
        self.held_out = settings.eval_fraction > 0

    def rows(self) -> Iterator[Encoded]:
        for row in encoded_rows(self.settings, self.split, self.tally, self.limit):
            self.lengths.append(row.length)
            self.learnt.append(row.learnt)
            self.truncated.append(row.too_long)
            if self.held_out:
                self.groups.append(group_digest(self.settings.shape, row.columns))
            yield row

    @cached_property
    def splits(self) -> dict[str, Any]:
        """Split name to a mask over the rows, once all have passed."""
        import numpy as np

        if not self.held_out:
            return {self.split: np.ones(len(self.lengths), dtype=bool)}
        eval_R = _held_out(self.groups, self.settings)
        return {"train": ~eval_R, "eval": eval_R}

    def reports(self) -> dict[str, Report]:
        import numpy as np

        tally, settings = self.tally, self.settings
        seen = min(tally.read, self.limit or tally.read)
        scale = tally.read / seen
        if settings.max_samples is not None and self.split == "train":
            scale = min(scale, settings.max_samples / len(self.lengths))
        length_R, learnt_R, truncated_R = (
            np.array(one) for one in (self.lengths, self.learnt, self.truncated)
        )
        reports = {}
        for split, mask_R in self.splits.items():
            summary = summarise(length_R[mask_R], learnt_R[mask_R], tally.longest, scale)
            lost = (
                {}
                if split != self.split
                else {
                    "bad_total": round(tally.bad_total * scale),
                    "bad": [asdict(bad) for bad in tally.bad],
                    "skipped": round(tally.skipped * scale),
                    "dropped_nothing_left": round(tally.dropped_nothing_left * scale),
                }
            )
            reports[split] = Report(
                rows=summary["count"],
                format=tally.format,
                shape=settings.shape,
                lengths=summary,
                truncated=round(int(truncated_R[mask_R].sum()) * scale),
                sampled=tally.read > seen,
                **lost,
            )
        return reports


def _held_out(groups: list[bytes], settings: Settings) -> Any:
    """Which rows are for evaluation: `eval_fraction` of them, drawn by `split_seed`.

    Rows of one group, which are copies or answers to one prompt, stay together, so that nothing evaluated was
    trained on. Raises Refused where one of the two sides would be empty.
    """
    import numpy as np

    wanted = max(1, round(settings.eval_fraction * len(groups)))
    index: dict[bytes, int] = {}
    group_R = np.array([index.setdefault(group, len(index)) for group in groups])
    size_G = np.bincount(group_R)
    order_G = np.random.Generator(np.random.PCG64(settings.split_seed)).permutation(len(size_G))
    taken_G = np.zeros(len(size_G), dtype=bool)
    count = 0
    for group in order_G:
        if count + size_G[group] <= wanted:
            taken_G[group] = True
            count += int(size_G[group])
        if count == wanted:
            break
    eval_R = taken_G[group_R]
    if not eval_R.any() or eval_R.all():
        raise Refused(
            Problem(
                key="data.eval_fraction",
                value=settings.eval_fraction,
                why=f"of {len(groups)} rows, {len(index)} of them different, {wanted} cannot be held out "
                "and some be left",
                fix="give more rows, another fraction, or data.eval",
            )
        )
    return eval_R


def _each_split(settings: Settings, work: Callable[[str], None]) -> None:
    """Does the work for each list of files, and raises what is wrong with any of them together."""
    problems: list[Problem] = []
    with threads(settings.num_proc):
        for split in settings.files:
            try:
                work(split)
            except Refused as refused:
                problems += refused.problems
    if problems:
        raise Refused(problems)


def _build(settings: Settings, folder: Path) -> None:
    saved: dict[str, Any] = {}

    def tokenise(split: str) -> None:
        account = _Account(settings, split)
        whole = folder / "whole.arrow"
        rows = (row.columns for row in account.rows())
        columns = write(whole, settings.shape, rows, settings.files[split])
        reports = account.reports()
        if len(reports) == 1:
            whole.rename(folder / f"{split}.arrow")
        else:
            for name, mask_R in account.splits.items():
                part(whole, folder / f"{name}.arrow", mask_R)
            whole.unlink()
        for name, report in reports.items():
            size = (folder / f"{name}.arrow").stat().st_size
            saved[name] = {"columns": columns, "report": report.to_dict() | {"bytes": size}}

    _each_split(settings, tokenise)
    (folder / "report.json").write_text(json.dumps(saved, indent=1), encoding="utf-8")
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
