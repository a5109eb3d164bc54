"""Libraries that a run does not use, and that others import on the way: to look whether its model is one of theirs."""

from __future__ import annotations

import sys


def deepspeed(spread: str) -> None:
    """Has DeepSpeed be absent from this process, unless the run is spread by it: before others ask whether it is there.

    accelerate imports it wherever it unwraps a model, and DeepSpeed imports MLflow: a second of each run's start.
    None in sys.modules is Python's own way to say that a module is not to be found.
    """
    if spread != "deepspeed":
        sys.modules.setdefault("deepspeed", None)  # type: ignore[arg-type]
