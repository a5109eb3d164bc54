"""Easy rows first (Bengio et al. 2009): the sampler of `training.curriculum`, and how hard each row is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler


def split(metric_R: Any, buckets: int) -> list[Any]:
    """Row numbers in `buckets` of equally many rows (to one), those of the smallest metric first; equals in order."""
    return np.array_split(np.argsort(metric_R, kind="stable"), buckets)


class Curriculum(Sampler[int]):
    """Row numbers, bucket by bucket in the first epoch, each shuffled by `seed`.

    From the second epoch on all rows are shuffled together, by the seed and the epoch's number. `metric_R`: how hard
    each row of the data is, by which the buckets were made.
    """

    def __init__(self, buckets: Sequence[Any], *, seed: int, metric_R: Any):
        self.buckets = [torch.as_tensor(bucket) for bucket in buckets]
        self.rows, self.seed, self.epoch = sum(map(len, buckets)), seed, 0
        self.metric_R = metric_R

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader, on a resume too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        buckets = self.buckets if self.epoch == 0 else [torch.arange(self.rows)]
        for bucket in buckets:
            yield from bucket[torch.randperm(len(bucket), generator=generator)].tolist()


def tokens(file: Path) -> Any:
    """Tokens of each row of an Arrow stream, those of prompt and both answers of a pair."""
    import pyarrow as pa
    import pyarrow.compute as pc

    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
        names = [name for name in reader.schema.names if name.endswith("_ids")]
        return np.concatenate(
            [sum(pc.list_value_length(batch[name]).to_numpy() for name in names) for batch in reader]
        )


def difficulty(file: Path) -> Any:
    """The column `difficulty` of an Arrow stream."""
    from soup.data.arrow import column

    return np.array(list(column(file, "difficulty")))
