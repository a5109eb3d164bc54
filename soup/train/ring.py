"""Rows cut for a ring: each of its processes reads the same rows, keeps its part of them, and trains on that.

Labels are shifted before the cut, so that the last token of a part still learns its successor. transformers counts
the learnt tokens of all processes, and gradients are averaged over all of them: a part's loss is its sum over the
whole count, and what a row gives is the sum of its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.nn.functional import pad

from soup import ring
from soup.model.ring import Cut, Ring, laid, make

STARTS = "document_starts"  # in a batch that is a part: where its whole row's documents begin
UNLEARNT = -100


class Parts:
    """A collator that cuts what another one makes, and gives this process's part of each row."""

    def __init__(self, whole: Callable[[Sequence[Any]], Mapping[str, Tensor]], among: Ring):
        self.whole, self.among = whole, among

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        batch = self.whole(examples)
        ids_BT, labels_BT, positions_BT = batch["input_ids"], batch["labels"], batch.get("position_ids")
        rows, length = ids_BT.shape
        starts = [0]
        if positions_BT is not None:  # documents one after another, in a single row
            starts = (positions_BT[0] == 0).nonzero().flatten().tolist()
        added = -length % ring.multiple(self.among.size, self.among.layout)
        positions_BT = torch.arange(length)[None].expand(rows, -1) if positions_BT is None else positions_BT
        if added and len(starts) > 1:  # what fills up is a document of its own
            starts.append(length)
        counted = torch.arange(added) + (0 if len(starts) > 1 else length)
        mask_BT = batch.get("attention_mask", torch.ones_like(ids_BT))
        cut = Cut(self.among, length + added, tuple(starts))
        at = torch.tensor(cut.positions)
        return {
            "input_ids": pad(ids_BT, (0, added))[:, at],
            "attention_mask": pad(mask_BT, (0, added))[:, at],
            "position_ids": torch.cat([positions_BT, counted[None].expand(rows, -1)], 1)[:, at],
            "labels": pad(labels_BT, (0, added), value=UNLEARNT)[:, at],
            "shift_labels": pad(labels_BT[:, 1:], (0, added + 1), value=UNLEARNT)[:, at],
            STARTS: torch.tensor(starts),
        }


class Ringed:
    """Mixed in before TRL's SFT trainer, which then trains on parts of rows."""

    ring_size: int
    ring_layout: str
    ring: Ring

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self.ring = make(self.ring_size, self.ring_layout)
        self.accelerator.gather_for_metrics = self._of_rows
        self.gather_function = self._of_rows

    @property
    def parts(self) -> Parts:
        return Parts(self.data_collator, self.ring)

    def positions(self, length: int) -> list[int]:
        """Those of a row that this process holds."""
        return Cut(self.ring, length, (0,)).positions

    def _get_dataloader(self, *given: Any, **named: Any) -> Any:
        """Batches of parts; the processes of a ring draw the same rows."""
        whole, self.data_collator = self.data_collator, self.parts
        try:
            loader = super()._get_dataloader(*given, **named)
        finally:
            self.data_collator = whole
        shard = loader.batch_sampler
        if not isinstance(shard, BatchSamplerShard):
            raise TypeError(f"accelerate gives rows to processes by {type(shard).__name__}")
        shard.num_processes //= self.ring.size
        shard.process_index //= self.ring.size
        if shard.num_processes == 1:  # it would fill the last batch up with the first one's rows
            shard.even_batches = False
        return loader

    @contextmanager
    def laid(self, inputs: dict[str, Any]) -> Iterator[bool]:
        """Within, `inputs` are parts of rows, if the loader has cut them."""
        starts = inputs.pop(STARTS, None)
        if starts is None:
            yield False
            return
        length = inputs["input_ids"].shape[1] * self.ring.size
        with laid(Cut(self.ring, length, tuple(starts.tolist()))):
            yield True

    def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        with self.laid(inputs):
            return super().training_step(model, inputs, *rest, **named)

    def prediction_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        with self.laid(inputs) as cut:
            loss, *others = super().prediction_step(model, inputs, *rest, **named)
            if cut:  # of all parts
                dist.all_reduce(loss, group=self.ring.group)
                loss /= self.ring.size
        return (loss, *others)

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        """What TRL counts and sums up for its metrics is of parts, and all of them count."""
        self.accelerator.gather_for_metrics = self.accelerator.gather
        try:
            return super().compute_loss(model, inputs, *rest, **named)
        finally:
            self.accelerator.gather_for_metrics = self._of_rows

    def _of_rows(self, values: Tensor, *_: Any, **__: Any) -> Tensor:
        """Of each row once, from one process of each ring, without rows that fill up the last batch."""
        every = self.accelerator.gather(values)
        rows = every.reshape(-1, self.ring.size, len(values))[:, 0].flatten()
        state = self.accelerator.gradient_state
        return rows[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else rows
