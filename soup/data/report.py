"""What became of the data: counts, bad rows and lengths. Shown before training, and read by `soup plan`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

SAMPLE = 1000  # lengths that stand for all
BAD_KEPT = 20  # bad rows that are named; the rest are counted


@dataclass(frozen=True, kw_only=True)
class Report:
    """One split. Counts are rows, lengths are tokens.

    `rows` are there to train on. `bad` names the first BAD_KEPT bad rows as {source, line, why, fix};
    `bad_total` counts all. `skipped` were too long (data.on_too_long=skip); `truncated` are among `rows`;
    `dropped_nothing_left` would have had nothing to learn from once truncated. Where data.eval_fraction parts
    a split from the training files, bad, skipped and dropped rows are in the training split's report.
    `sources`: {name, format, read, rows, lost} of each, in order: the rows in its files, those of it among `rows`,
    and those that were bad, skipped or dropped.

    `lengths`, after truncation: count, mean, p50, p95, max, sum, sum_labels (tokens learnt), longest (before
    truncation), histogram {"edges": n + 1 numbers, "counts": n}, and sample: the lengths themselves in order, 1000
    evenly spaced ones where there are more. A preference pair's length is that of its
    longer side. In `lengths`, too: common, the tokens that all rows begin with, and shared, those that the two sides of
    a pair do, on average. `sampled`: measured on the first rows only; `rows`, the counts and the sums are scaled up to
    the whole, but for a stream, whose end nobody has seen. `bytes`: of the tokenised file; 0 where there is none.
    """

    rows: int
    format: str
    shape: str
    lengths: dict[str, Any]
    bad_total: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0
    truncated: int = 0
    dropped_nothing_left: int = 0
    bytes: int = 0
    sampled: bool = False
    sources: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        return cls(**{one.name: data[one.name] for one in fields(cls)})


def summarise(length_R: Any, learnt_R: Any, longest: int, scale_R: Any) -> dict[str, Any]:
    """Length statistics of R rows (tokens). In a sample each row stands for `scale_R` rows of its source."""
    import numpy as np

    if len(length_R) == 0:
        return {
            "count": 0,
            "mean": 0.0,
            "p50": 0,
            "p95": 0,
            "max": 0,
            "sum": 0,
            "sum_labels": 0,
            "longest": longest,
            "histogram": {"edges": [], "counts": []},
            "sample": [],
        }
    bins = min(12, int(length_R.max() - length_R.min()) + 1)
    counts_B, edges_B = np.histogram(length_R, bins=bins, weights=scale_R)
    alike = bool((scale_R == scale_R[0]).all())
    weigh = {} if alike else {"weights": scale_R, "method": "inverted_cdf"}
    spaced_P = np.linspace(0, 1, min(SAMPLE, len(length_R)))
    spread_P = np.sort(length_R)[np.linspace(0, len(length_R) - 1, len(spaced_P)).astype(int)]
    return {
        "count": round(float(scale_R.sum())),
        "mean": round(float(length_R.mean() if alike else np.average(length_R, weights=scale_R)), 2),
        "p50": int(np.percentile(length_R, 50, **weigh)),
        "p95": int(np.percentile(length_R, 95, **weigh)),
        "max": int(length_R.max()),
        "sum": round(float((length_R * scale_R).sum())),
        "sum_labels": round(float((learnt_R * scale_R).sum())),
        "longest": longest,
        "histogram": {
            "edges": [round(float(edge), 1) for edge in edges_B],
            "counts": [round(float(count)) for count in counts_B],
        },
        "sample": (spread_P if alike else np.percentile(length_R, 100 * spaced_P, **weigh))
        .astype(int)
        .tolist(),
    }
