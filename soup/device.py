"""What a run will train on, found without importing torch (a login node has none to spare)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia/gpus")  # an entry for each GPU
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
    if requested == "cuda" or (requested == "auto" and gpus()):
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


def slots(requested: int | str, device: Device) -> int:
    """How many runs train at a time: `launch.slots`, of which auto is one for each GPU, and one without."""
    if isinstance(requested, int):
        return requested
    return max(1, len(gpus())) if device.kind == "cuda" else 1


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    every = [str(number) for number in range(len(list(DRIVER.glob("*"))))]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not every:
        return every
    named = [name.strip() for name in visible.split(",")]
    return [] if named[0] in ("", "-1") else named


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return frozenset(next(lines, ":").split(":", 1)[1].split())
