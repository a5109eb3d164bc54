"""Proof that each setting is in force: probes read the built objects, never the request.

A probe is a function of `Built` that yields one `Effect` for each key it speaks about. Specs name their probes
(`optimizer:groups` is `soup.effects.optimizer.groups`). Probes draw no random number and leave no state.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from soup.errors import Problem, Refused
from soup.schema import GROUPS

COMMON = ("loop:processes", "loop:device")

# Keys that are consumed before or after training: nothing on the built trainer could show them, so nothing is claimed.
OUTSIDE = "outside training"
ELSEWHERE = {
    "run.": "read by soup, where it places, continues and lists runs",
    "launch.": "read by the launcher",
    "tracking.": "read by the tracker",
    "data.num_proc": "read by soup's tokeniser before this process began; rows are the same with any number",
}


class NotInForce(Refused):
    """Settings that were accepted and built, and did not take effect."""


@dataclass(frozen=True)
class Effect:
    """What is in force for one key. `how` says where that was read."""

    key: str
    requested: Any
    effective: Any
    ok: bool
    how: str


def prove(built: Any) -> list[Effect]:
    """Runs every probe of the configuration, and accounts for every key of it.

    A key that no probe speaks about is a mismatch: nothing is known to read it.
    """
    found: dict[str, Effect] = {}
    for _, effect in spoken(built):
        if effect.key not in found or found[effect.key].ok:  # what one probe found wrong stays wrong
            found[effect.key] = effect
    leaves = dict(_leaves(built.config.tree))
    named = {f"{group}.name" for group in GROUPS}
    stray = set(found) - set(leaves) - named
    if stray:
        raise KeyError(f"probes speak about keys that do not exist: {sorted(stray)}")
    proved = [found[key] for key in sorted(named & set(found))]
    for key, value in leaves.items():
        elsewhere = next((why for prefix, why in ELSEWHERE.items() if key.startswith(prefix)), None)
        if key in found:
            proved.append(found[key])
        elif elsewhere is not None:
            proved.append(Effect(key, value, OUTSIDE, True, elsewhere))
        else:
            proved.append(Effect(key, value, None, False, "no probe reads this key"))
    return proved


def spoken(built: Any) -> Iterator[tuple[str, Effect]]:
    """What each probe of the configuration says, with the probe's name; several may speak about one key."""
    for name in dict.fromkeys([*(name for spec in built.config.specs() for name in spec.effects), *COMMON]):
        module, _, function = name.partition(":")
        probe = getattr(importlib.import_module(f"soup.effects.{module}"), function)
        for effect in probe(built):
            yield name, effect


def required(proved: Iterable[Effect]) -> None:
    """Refuses a run in which a setting did not take effect.

    Raises:
        NotInForce: with all that did not.
    """
    wrong = [one for one in proved if not one.ok]
    if wrong:
        raise NotInForce(
            Problem(
                key=one.key,
                value=one.requested,
                why=f"did not take effect: {one.effective} is in force ({one.how})",
                fix="report this: soup or a library under it dropped the setting",
            )
            for one in wrong
        )


def to_json(proved: Iterable[Effect]) -> dict[str, Any]:
    """The content of effective.json: key to requested, effective, ok and how."""
    return {effect.key: {k: v for k, v in asdict(effect).items() if k != "key"} for effect in proved}


def same(key: str, requested: Any, effective: Any, how: str) -> Effect:
    """An effect that is right when the two are equal; numbers to float32's precision."""
    if isinstance(requested, float) and isinstance(effective, int | float):
        ok = abs(requested - effective) <= 1e-6 * max(abs(requested), abs(effective))
    else:
        ok = requested == effective
    return Effect(key, requested, effective, ok, how)


@contextmanager
def as_it_was(model: Any) -> Iterator[None]:
    """Afterwards torch's random state and the modes of the model's modules are what they were before."""
    import torch

    modes = {module: module.training for module in model.modules()}
    cuda = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}.")
        elif not (key == "name" and prefix.rstrip(".") in GROUPS):
            yield path, value
