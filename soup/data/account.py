"""The rows of one split as they pass, and the reports on them and on what is held out of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from os.path import commonprefix
from typing import Any

from soup.data.build import group_digest
from soup.data.encode import Encoded
from soup.data.report import Report, summarise
from soup.data.settings import Settings
from soup.data.shapes import ANSWERS
from soup.data.sources import encoded_rows, merged, sources
from soup.errors import Problem, Refused


class Account:
    """`limit`: rows that are encoded, the rest being counted (of a stream not even that)."""

    def __init__(self, settings: Settings, split: str, limit: int | None = None):
        self.settings, self.split, self.limit = settings, split, limit
        self.given = sources(settings, split, limit=limit)
        self.source: list[int] = []
        self.lengths: list[int] = []
        self.learnt: list[int] = []
        self.truncated: list[bool] = []
        self.groups: list[bytes] = []
        self.paired = len(ANSWERS.get(settings.shape, ())) > 1
        self.prompts: list[int] = []
        self.common: list[int] | None = None
        self.held_out = settings.eval_fraction > 0

    def rows(self) -> Iterator[Encoded]:
        for number, row in encoded_rows(self.settings, self.split, self.given):
            self.source.append(number)
            self.lengths.append(row.length)
            self.learnt.append(row.learnt)
            self.truncated.append(row.too_long)
            ids = row.columns.get("input_ids", row.columns.get("prompt_ids", ()))
            self.prompts.append(len(ids) if self.paired else 0)
            known = ids if self.common is None else self.common
            self.common = commonprefix([list(known), list(ids[: len(known)])])
            if self.held_out:
                self.groups.append(group_digest(self.settings.shape, row.columns))
            yield row

    @cached_property
    def splits(self) -> dict[str, Any]:
        """Split name to a mask over the rows, once all have passed."""
        import numpy as np

        if not self.held_out:
            return {self.split: np.ones(len(self.lengths), dtype=bool)}
        eval_R = held_out(self.groups, self.source, self.settings)
        return {"train": ~eval_R, "eval": eval_R}

    def _scales(self) -> tuple[bool, Any]:
        """Whether there are rows that were not looked at, and how many rows each row of a source stands for."""
        import numpy as np

        settings = self.settings
        read_S = np.array([source.tally.read for source in self.given])
        seen_S = np.array([min(s.tally.read, s.limit or s.tally.read) for s in self.given])
        sampled = bool((read_S > seen_S).any())
        scale_S = np.ones(len(read_S))
        if not sampled or settings.streams(self.split):
            return sampled, scale_S
        taken_S = np.bincount(self.source, minlength=len(read_S))
        rows_S = taken_S * read_S / np.maximum(seen_S, 1)
        shares = settings.shares(self.split)
        rows = rows_S.sum() if shares is None else (rows_S / np.array(shares)).min()
        if shares is not None:
            scale_S[:] = rows / taken_S.sum()
        else:
            scale_S = read_S / np.maximum(seen_S, 1)
        if settings.max_samples is not None and self.split == "train":
            scale_S *= min(1.0, settings.max_samples / rows)
        return sampled, scale_S

    def reports(self) -> dict[str, Report]:
        import numpy as np

        tally, settings = merged(self.given), self.settings
        sampled, scale_S = self._scales()
        mean_scale = float(scale_S.mean())
        source_R, length_R, learnt_R, truncated_R, prompt_R = (
            np.array(one) for one in (self.source, self.lengths, self.learnt, self.truncated, self.prompts)
        )
        scale_R = scale_S[source_R]
        reports = {}
        for split, mask_R in self.splits.items():
            summary = summarise(length_R[mask_R], learnt_R[mask_R], tally.longest, scale_R[mask_R])
            shared = round(float(prompt_R[mask_R].mean()), 2) if mask_R.any() else 0.0
            lost = (
                {}
                if split != self.split
                else {
                    "bad_total": round(tally.bad_total * mean_scale),
                    "bad": [asdict(bad) for bad in tally.bad],
                    "skipped": round(tally.skipped * mean_scale),
                    "dropped_nothing_left": round(tally.dropped_nothing_left * mean_scale),
                }
            )
            count_S = np.bincount(source_R[mask_R], weights=scale_R[mask_R], minlength=len(self.given))
            reports[split] = Report(
                rows=summary["count"],
                format=tally.format,
                shape=settings.shape,
                lengths=summary | {"common": len(self.common or ()), "shared": shared},
                truncated=round(float((truncated_R * scale_R)[mask_R].sum())),
                sampled=sampled,
                sources=[
                    {
                        "name": source.name,
                        "format": source.tally.format,
                        "read": source.tally.read,
                        "rows": round(float(count)),
                        "lost": round(source.tally.lost * float(scale)) if split == self.split else 0,
                    }
                    for source, count, scale in zip(self.given, count_S, scale_S, strict=True)
                ],
                **lost,
            )
        return reports


def held_out(groups: list[bytes], source: list[int], settings: Settings) -> Any:
    """Which rows are for evaluation: `eval_fraction` of each source's, drawn by `split_seed`.

    Rows of one group, which are copies or answers to one prompt, stay together, so that nothing evaluated was
    trained on; a group counts as its first row's source. Raises Refused where one of the two sides would be empty.
    """
    import numpy as np

    index: dict[bytes, int] = {}
    group_R = np.array([index.setdefault(group, len(index)) for group in groups])
    size_G = np.bincount(group_R)
    first_G = np.unique(group_R, return_index=True)[1]
    source_G = np.array(source)[first_G]
    order_G = np.random.Generator(np.random.PCG64(settings.split_seed)).permutation(len(size_G))
    rows_S = np.bincount(source_G, weights=size_G)
    wanted_S = np.round(settings.eval_fraction * rows_S).astype(int)
    if not wanted_S.any():
        wanted_S[rows_S.argmax()] = 1
    count_S = np.zeros_like(wanted_S)
    taken_G = np.zeros(len(size_G), dtype=bool)
    for group in order_G:
        at = source_G[group]
        if count_S[at] + size_G[group] <= wanted_S[at]:
            taken_G[group] = True
            count_S[at] += size_G[group]
        if (count_S == wanted_S).all():
            break
    eval_R = taken_G[group_R]
    if not eval_R.any() or eval_R.all():
        raise Refused(
            Problem(
                key="data.eval_fraction",
                value=settings.eval_fraction,
                why=f"of {len(groups)} rows, {len(index)} of them different, {wanted_S.sum()} cannot be held out "
                "and some be left",
                fix="give more rows, another fraction, or data.eval",
            )
        )
    return eval_R
