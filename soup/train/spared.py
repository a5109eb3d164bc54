"""Libraries that a run does not use, and that others import on the way: to look whether something is one of theirs.

They are a quarter of the time that a run's imports take, and some 75 MB of its memory. DeepSpeed and TRL's GRPO also
import MLflow. None in sys.modules is Python's own way to say that a module is not to be found.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from soup.schema import Config

MODULES = {  # by distribution
    "bitsandbytes": "bitsandbytes",
    "deepspeed": "deepspeed",
    "liger-kernel": "liger_kernel",
    "mlflow-skinny": "mlflow",
    "torchao": "torchao",
    "wandb": "wandb",
}


def unused(config: Config) -> set[str]:
    """Distributions of MODULES that none of the run's settings needs. What Unsloth and a user's own code import is
    theirs to say."""
    foreign = config.backend.unsloth or config.task.files or config.model.trust_remote_code
    return ({"deepspeed"} if foreign else set(MODULES)) - config.distributions()


def absent(distributions: Iterable[str]) -> None:
    """Has them be absent from this process: before others ask whether they are there."""
    for name in distributions:
        sys.modules.setdefault(MODULES[name], None)  # type: ignore[arg-type]
