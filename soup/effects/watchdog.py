"""The loss watchdog, tried with losses on a copy of the one that the trainer reports to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from soup.effects import Effect, same


def watchdog(built: Any) -> Iterator[Effect]:
    """What stops it at once, from which loss on a step is bad, and how many bad ones in a row stop it."""
    tree = built.config.tree["training"]
    names = [type(callback).__name__ for callback in built.trainer.callback_handler.callbacks]
    live = built.trainer.watchdog
    how = f"callbacks: {', '.join(names)}"
    if not built.config.training.loss_watchdog:
        off = live is None and not any("Watchdog" in name for name in names)
        for key in ("", "_threshold", "_patience", "_action"):
            value = tree[f"loss_watchdog{key}"]
            yield Effect(f"training.loss_watchdog{key}", value, value if off else "on", off, how)
        return
    listens = live is not None and any(one is live for one in built.trainer.callback_handler.callbacks)
    if not listens:
        yield Effect("training.loss_watchdog", True, False, False, how)
        return
    at_once = [not _survives(live, 1, *bad) for bad in ((math.nan, 1.0), (1.0, math.inf), (1.0, math.nan))]
    yield same(
        "training.loss_watchdog", True, all(at_once), "losses and gradients that are not finite stop it"
    )
    threshold = tree["loss_watchdog_threshold"]
    bad = next(
        (x for x in (threshold * 0.999, threshold * 1.001) if not _survives(live, 10_000, x, 1.0)), None
    )
    ok = bad is not None and bad > threshold
    how = f"{bad} for 10,000 steps stops it"
    yield Effect("training.loss_watchdog_threshold", threshold, threshold if ok else bad, ok, how)
    steps = next((n for n in range(1, 10_001) if not _survives(live, n, threshold * 1.001, 1.0)), None)
    how = "bad steps in a row that stop it"
    yield same("training.loss_watchdog_patience", tree["loss_watchdog_patience"], steps, how)
    action = "rollback" if live.rolls_back else "stop"
    how = "what the watchdog says to do once it has stopped the loop"
    yield same("training.loss_watchdog_action", tree["loss_watchdog_action"], action, how)


def _survives(live: Any, steps: int, loss: float, gradient_norm: float) -> bool:
    from soup.train.watchdog import Diverged

    watchdog = deepcopy(live)
    try:
        for step in range(1, steps + 1):
            watchdog.judge(step, loss, gradient_norm)
    except Diverged:
        return False
    return True
