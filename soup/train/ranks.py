"""The processes of one run, as each of them sees the others. A run of one process has nobody to ask."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from soup.device import Device
from soup.schema import Config
from soup.train.memory import give_large_blocks_back
from soup.train.stopper import Stopper


def join(config: Config, device: Device) -> None:
    """Makes the group of the run's processes, which accelerate and DeepSpeed find made.

    Numbers that lie in host memory go by gloo, on GPUs too. Who waits `distributed.timeout_s` for another one fails.
    """
    if config.distributed.world == 1 or dist.is_initialized():
        return
    if (
        device.kind == "cpu"
    ):  # accelerate would name it cpu:0, from which torch 2.13 cannot restore a checkpoint
        os.environ["ACCELERATE_TORCH_DEVICE"] = os.environ["DS_ACCELERATOR"] = "cpu"
        if config.distributed.spread == "fsdp":
            give_large_blocks_back()
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.kind == "cuda" else "gloo",
        timeout=timedelta(seconds=config.distributed.timeout_s),
    )


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that logs, tracks and writes what is written once."""
    return rank() == 0


def barrier() -> None:
    total(0)


def gather(value: Any) -> list[Any]:
    """Everyone's value, by rank."""
    if world() == 1:
        return [value]
    found = [None] * world()
    dist.all_gather_object(found, value)
    return found


def of_first(value: Any) -> Any:
    """The first process's value."""
    return gather(value if first() else None)[0]


def total(count: int) -> int:
    return int(_reduced(count, torch.int64, dist.ReduceOp.SUM))


def mean(value: float) -> float:
    return _reduced(value, torch.float64, dist.ReduceOp.SUM) / world()


def asked(stopper: Stopper) -> bool:
    """Whether any process was asked to stop; if so, then all are."""
    if world() > 1:
        own = 0 if stopper.asked is None else int(signal.Signals[stopper.asked])
        number = int(_reduced(own, torch.int64, dist.ReduceOp.MAX))
        stopper.asked = signal.Signals(number).name if number else None
    return stopper.asked is not None


def _reduced(value: float, dtype: torch.dtype, how: Any) -> float:
    if world() == 1:
        return value
    held = torch.tensor(value, dtype=dtype)
    dist.all_reduce(held, how)
    return held.item()
