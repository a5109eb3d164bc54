"""The most memory that this process has held."""

from __future__ import annotations

import resource


def peak_memory_bytes() -> int:
    """On a GPU what torch allocated there at most, else the peak resident size of the process, in bytes."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
