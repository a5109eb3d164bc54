"""Starts training processes: fresh ones, that read one run folder and die with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import IO

from soup.device import cores
from soup.record import Run, read_json


def threads(slots: int) -> int:
    """Threads of one run: this machine's cores shared by the runs that train at a time."""
    return max(1, cores() // slots)


def train(run: Run, *words: str) -> int:
    """Trains the run and returns the exit status of its process, negative for a signal.

    The child has a process group of its own, so that a terminal's Ctrl-C reaches it once: from here.
    """
    recorded = read_json(run.environment) or {}
    environment = variables(recorded.get("threads", threads(1)))
    return child(["-m", "soup.train", *words, str(run.folder)], os.environ | environment)


def variables(threads: int) -> dict[str, str]:
    """What a training process finds in its environment beside ours; libraries read it as they are imported.

    torch keeps the code that oneDNN compiled for each shape of a bfloat16 product, 1024 shapes twice over. Batches
    without padding have shapes of their own: hundreds of megabytes that are never used again.
    """
    return {
        **{
            name: os.environ.get(name, "256")
            for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
        },
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def child(
    words: list[str], environment: Mapping[str, str] | None = None, log: IO[bytes] | None = None
) -> int:
    """Runs `python WORDS` to its end, passing signals on; returns its exit status. `log` gets what it prints."""
    process = subprocess.Popen(
        [sys.executable, *words], env=environment, process_group=0, stdout=log, stderr=log
    )
    with _passing_on(process):
        return process.wait()


@contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """SIGINT and SIGTERM go on to the child, which saves and stops; this process waits for it."""

    def send(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, send) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
