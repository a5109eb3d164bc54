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
    at_once = [_stops(live, *bad) == 1 for bad in ((math.nan, 1.0), (1.0, math.inf), (1.0, math.nan))]
    at_once.append((_stops(live, 0.0, 1.0) == 1) != bool(built.config.task.generates))
    yield same(
        "training.loss_watchdog",
        True,
        all(at_once),
        "losses and gradients that are not finite stop it, and, of given rows, a loss of 0",
    )
    threshold = tree["loss_watchdog_threshold"]
    bad = next((x for x in (threshold * 0.999, threshold * 1.001) if _stops(live, x, 1.0)), None)
    ok = bad is not None and bad > threshold
    how = f"{bad} for 10,000 steps stops it"
    yield Effect("training.loss_watchdog_threshold", threshold, threshold if ok else bad, ok, how)
    steps = _stops(live, threshold * 1.001, 1.0)
    how = "bad steps in a row that stop it"
    yield same("training.loss_watchdog_patience", tree["loss_watchdog_patience"], steps, how)
    action = "rollback" if live.rolls_back else "stop"
    how = "what the watchdog says to do once it has stopped the loop"
    yield same("training.loss_watchdog_action", tree["loss_watchdog_action"], action, how)


def _stops(live: Any, loss: float, gradient_norm: float) -> int | None:
    """The step at which a copy stops, shown the same loss at each; `None` if not within 10,000."""
    from soup.train.watchdog import Diverged

    watchdog = deepcopy(live)
    for step in range(1, 10_001):
        try:
            watchdog.judge(step, loss, gradient_norm)
        except Diverged:
            return step
    return None
