"""Steps whose rows lie one after another without padding, as soup's kernels train them where they can."""

from __future__ import annotations

import math
from collections.abc import Sequence

from soup.schema import Config

LEAST = 16  # tokens that rows begin with alike, from which on they are computed once: a branch costs attention a mask


def own_kernels(config: Config) -> bool:
    """Whether soup's kernels take part, as far as the configuration says; `soup.kernels.fast` looks at the model."""
    stock = config.backend.unsloth or config.backend.kernels == "stock" or config.training.use_liger
    spread = config.distributed.world > 1 or config.distributed.spread != "none"
    return not stock and not spread and not config.longctx.use_ring_attention


def of_answers(config: Config) -> bool:
    """Whether soup's kernels compute the task's loss from log-probabilities of answers (`soup.kernels.answers`)."""
    given = config.task.forwards > 1 and config.task.head == "causal"
    return own_kernels(config) and (given or config.task.config == "trl:GRPOConfig")


def without_padding(config: Config) -> bool:
    """Whether a batch has no padding."""
    rows = config.task.config == "trl:SFTConfig" or of_answers(config) and not config.task.generates
    draws = config.lora.dropout > 0 or config.training.neftune_alpha > 0
    return own_kernels(config) and rows and not draws


def alike(rows: int, common: int, shared: float) -> float:
    """Tokens of a batch of rows, or pairs, that are computed once for several, at least (`soup.kernels.prefixes`).

    `common`: tokens that all rows begin with; `shared`: those that the sides of a pair do.
    """
    return (rows - 1) * (common if common >= LEAST else 0) + rows * shared


def row_tokens(lengths: Sequence[int], rows: int, batches: int) -> float | None:
    """Tokens of a row on average in the fullest of `batches` batches of `rows` rows; `None` without lengths.

    Sums of random rows are nearly normal, and of n of them the largest is sqrt(2 ln n) deviations above the mean.
    """
    if not lengths:
        return None
    mean = sum(lengths) / len(lengths)
    deviation = math.sqrt(sum((length - mean) ** 2 for length in lengths) / len(lengths) / rows)
    return min(max(lengths), mean + deviation * math.sqrt(2 * math.log(max(batches, 2))))
