"""Easy rows first (Bengio et al. 2009): the sampler of `training.curriculum`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler


class Curriculum(Sampler[int]):
    """Row numbers, bucket by bucket from the smallest metric to the largest in the first epoch.

    Buckets hold equally many rows (to one). Each is shuffled by `seed`; rows of one metric keep their order before
    that. From the second epoch on all rows are shuffled together, by the seed and the epoch's number.
    """

    def __init__(self, metric_R: Any, *, buckets: int, seed: int):
        order_R = np.argsort(metric_R, kind="stable")
        self.buckets = [torch.from_numpy(bucket) for bucket in np.array_split(order_R, buckets)]
        self.rows, self.seed, self.epoch = len(order_R), seed, 0

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
