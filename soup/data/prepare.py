"""Data files to cached Arrow files that the trainers read, once for each content and setting.

`<cache>/tokenised/<fingerprint>/` holds `train.arrow`, `eval.arrow` where there is one, the number of each row's source
(`train.sources.npy`) where there are several, and `report.json`; of a stream, which is tokenised while it trains, the
report alone. The Arrow files are IPC streams, as `datasets.Dataset.from_file` maps them. Columns:
  conversation, text   input_ids, labels (int32 lists of equal length; -100 where a token is not learnt)
  preference           prompt, chosen, rejected    texts or lists of {role, content}
  unpaired             prompt, completion, label
  prompt               prompt, and the row's other columns for reward functions
and a column of float64 for each of `Settings.numbers` in the training rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soup.cache import entry
from soup.data.account import Account
from soup.data.arrow import first, part, write
from soup.data.report import Report
from soup.data.settings import Settings
from soup.data.stream import Stream
from soup.errors import Problem, RecordError, Refused

SAMPLED_ROWS = 2000


@dataclass(frozen=True)
class Prepared:
    """One split of a complete cache entry. `stream`: its rows, where they are read while training."""

    folder: Path
    split: str
    report: Report
    columns: tuple[str, ...]
    fingerprint: str
    stream: Stream | None = None

    def open(self, split: str | None = None) -> Path:
        """The Arrow stream of this split (or another of the entry), for `datasets.Dataset.from_file`."""
        return self.folder / f"{split or self.split}.arrow"

    def first(self, rows: int) -> list[dict[str, Any]]:
        """The first rows, as they lie in the data."""
        if self.stream is not None:
            return self.stream.first(rows)
        return first(self.open(), rows)

    def sources(self) -> Any:
        """The number of each row's source."""
        import numpy as np

        file = self.folder / f"{self.split}.sources.npy"
        return np.load(file) if file.is_file() else np.zeros(self.report.rows, dtype=np.uint16)


def prepare(**arguments: Any) -> dict[str, Prepared]:
    """The splits of the data, `train` and, where there is one, `eval`, tokenised now or taken from the cache.

    The arguments are those of `soup.data.settings.Settings`. Raises Refused with every problem found, and
    RecordError where the cache cannot be written.
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
            folder,
            split,
            Report.from_dict(one["report"]),
            tuple(one["columns"]),
            settings.fingerprint,
            Stream(settings) if settings.streams(split) else None,
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
        account = Account(settings, split, SAMPLED_ROWS)
        for _ in account.rows():
            pass
        reports.update(account.reports())

    _each_split(settings, measure)
    return reports


def _folder(settings: Settings) -> Path:
    return Path(settings.cache) / "tokenised" / settings.fingerprint


def _each_split(settings: Settings, work: Callable[[str], None]) -> None:
    """Does the work for each list of files, and raises what is wrong with any of them together."""
    problems: list[Problem] = []
    for split in settings.sources:
        try:
            work(split)
        except Refused as refused:
            problems += refused.problems
    if problems:
        raise Refused(problems)


def _build(settings: Settings, folder: Path) -> None:
    import numpy as np

    saved: dict[str, Any] = {}

    def tokenise(split: str) -> None:
        if settings.streams(split):
            account = Account(settings, split, SAMPLED_ROWS)
            columns = list({name: None for row in account.rows() for name in row.columns})
            saved[split] = {"columns": columns, "report": account.reports()[split].to_dict()}
            return
        account = Account(settings, split)
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
            if len(report.sources) > 1:
                source_R = np.array(account.source, dtype=np.uint16)
                np.save(folder / f"{name}.sources.npy", source_R[account.splits[name]])
            size = (folder / f"{name}.arrow").stat().st_size
            saved[name] = {"columns": columns, "report": report.to_dict() | {"bytes": size}}

    _each_split(settings, tokenise)
    (folder / "report.json").write_text(json.dumps(saved, indent=1), encoding="utf-8")
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
