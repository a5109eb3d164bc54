"""The most memory that this process has held, and how it comes to hold less."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

STATUS = Path("/proc/self/status")
M_MMAP_THRESHOLD = -3  # malloc.h
LARGE = 2**20  # bytes


def peak_memory_bytes() -> int:
    """On a GPU what torch allocated there at most, else the peak resident size of the process, in bytes.

    Linux's own figure is that of this program: what getrusage says of a process that was started by exec is at least
    what the one that started it held.
    """
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if STATUS.is_file() and (found := re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_large_blocks_back() -> None:
    """Has glibc's malloc return large blocks to the system when they are freed.

    Else it keeps them, up to 32 MB each: what FSDP2 gathers and gives up again, layer by layer, stays with each process
    in holes that the next layer's copies do not fit (bench/NOTES.md). Other C libraries do as they do.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
