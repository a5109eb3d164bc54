"""Names of a model's modules, from its files: what an adapter is to be placed on is looked up before anything loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soup.errors import Problem
from soup.rules import is_moe
from soup.schema import Config


def untargeted(config: Config, folder: Path, model: Mapping[str, Any]) -> Problem | None:
    """The first of `lora.target_modules` that no module of the model in `folder` ends in; `None` if all are there.

    `model`: its config.json. Experts have other names on disk than in memory, so a mixture of experts is left to PEFT,
    as are a folder without weights and one whose weights cannot be read.
    """
    wanted, files = config.lora.target_modules, sorted(folder.glob("*.safetensors"))
    if wanted in ("all-linear", ()) or not files or is_moe(model):
        return None
    found = _modules(files)
    if not found:
        return None
    for name in (wanted,) if isinstance(wanted, str) else wanted:
        if not any(module == name or module.endswith(f".{name}") for module in found):
            leaves = sorted({module.rpartition(".")[2] for module in found if not module.endswith("norm")})
            return Problem(
                key="lora.target_modules",
                value=config.tree["lora"]["target_modules"],
                why=f"this model has no module {name}",
                fix=f"lora.target_modules=all-linear, or of: {', '.join(leaves)}",
            )
    return None


def _modules(files: list[Path]) -> set[str]:
    """Modules that have a weight of their own."""
    from safetensors import SafetensorError, safe_open

    found: set[str] = set()
    for file in files:
        try:
            with safe_open(file, framework="np") as tensors:
                found |= {key.removesuffix(".weight") for key in tensors.keys() if key.endswith(".weight")}  # noqa: SIM118
        except SafetensorError:
            return set()
    return found
