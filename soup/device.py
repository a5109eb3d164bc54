"""What a run will train on, found without importing torch (a login node has none to spare)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86's two, and Arm's


@dataclass(frozen=True, kw_only=True)
class Device:
    """`kind`: cpu or cuda. `bf16`: whether it multiplies bfloat16 in hardware. `reason` says how it is known.

    `memory_bytes`: what one such device holds, and `memory_reason` why that is believed.
    """

    kind: str
    bf16: bool
    reason: str
    memory_bytes: int = 80_000_000_000
    memory_reason: str = "assumed"


def resolve(requested: str) -> Device:
    """The device that `launch.device` stands for: `auto` is cuda where an NVIDIA driver is loaded."""
    if requested == "cuda" or (requested == "auto" and _gpus()):
        return Device(kind="cuda", bf16=True, reason="GPUs since Ampere compute bfloat16")
    flags = sorted(BF16_FLAGS & _cpu_flags())
    reason = f"this CPU has {', '.join(flags)}" if flags else "this CPU has no bfloat16 instructions"
    return Device(
        kind="cpu", bf16=bool(flags), reason=reason, memory_bytes=_memory(), memory_reason="this machine's"
    )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _memory() -> int:
    """Bytes of memory that this machine has, or this container may use."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return found
    return min(found, int(limit)) if limit.isdigit() else found


def _gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return 0
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return frozenset(next(lines, ":").split(":", 1)[1].split())
