"""What the runs were made with, and the commands that make them again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from soup.report.chosen import Chosen
from soup.report.point import Point

# Those that decide what a step computes; env.json has all.
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
    "torchao",
    "liger-kernel",
    "unsloth",
    "deepspeed",
    "flash-attn",
    "galore-torch",
    "numpy",
    "hydra-core",
    "omegaconf",
    "soup-launcher",
)


@dataclass(frozen=True)
class Version:
    """`runs`: how many have it; `found` is the commonest first where runs differ."""

    name: str
    found: tuple[tuple[str, int], ...]


def versions(points: Sequence[Point]) -> list[Version]:
    """Python, machine, soup's source and the packages that matter, each with how many runs had it."""
    told = [point.environment for point in points if point.environment]
    listed = [
        Version(title, _counted([str(one.get(key, "-"))[:64] for one in told]))
        for title, key in (
            ("python", "python"),
            ("platform", "platform"),
            ("host", "host"),
            ("threads", "threads"),
            ("soup's source", "source"),
        )
    ]
    installed = [_by_name(packages) for one in told if isinstance(packages := one.get("packages"), dict)]
    for name in PACKAGES:
        found = [packages.get(name, "-") for packages in installed]
        if any(version != "-" for version in found):
            listed.append(Version(name, _counted(found)))
    return [one for one in listed if one.found]


def commands(chosen: Chosen) -> list[tuple[str, str]]:
    """What each does, and the command: a sweep's as it was given; a run's from its frozen configuration."""
    told = []
    for sweep in chosen.sweeps:
        words = sweep.record()["command"]
        told.append((f"sweep {sweep.id}", shlex.join(["python", "-m", "soup", *map(str, words)])))
    if len(chosen.points) == 1:
        run, _ = chosen.points[0]
        told.append((f"run {run.id}", reproduce(run.folder)))
    return told


def reproduce(folder: object) -> str:
    return shlex.join(["python", "-m", "soup", "--config-path", str(folder)])


def _by_name(packages: Mapping[str, Any]) -> dict[str, str]:
    """Packages call themselves liger_kernel or liger-kernel; pip takes the two for one."""
    return {str(name).lower().replace("_", "-"): str(version) for name, version in packages.items()}


def _counted(values: Sequence[str]) -> tuple[tuple[str, int], ...]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return tuple(sorted(counts.items(), key=lambda one: -one[1]))
