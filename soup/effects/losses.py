"""The papers' losses in float64, from log-probabilities: what the trainer's own number is compared with.

One function for each task, of the same name as its choice. `policy` and `reference` hold one `Row` for each row of
the batch; the keywords are the task's own knobs, by their names in the configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Row:
    """What the model says of one row, by the side's name (`chosen`, `rejected`, `completion`, `mismatched`).

    `answers`: log-probabilities of the learnt tokens, shape (T,). `whole`: those of all tokens but the first.
    `score`: the number that a reward model gives, shape ().
    """

    answers: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    score: dict[str, Tensor] = field(default_factory=dict)
    label: bool = True


Rows = Sequence[Row]


def _sums(rows: Rows, side: str) -> Tensor:
    return torch.stack([row.answers[side].sum() for row in rows])


def _means(rows: Rows, side: str) -> Tensor:
    return torch.stack([row.answers[side].mean() for row in rows])


def sft(policy: Rows, _: Rows) -> Tensor:
    """Mean negative log-likelihood of the learnt tokens of the batch."""
    return -torch.cat([row.answers["completion"] for row in policy]).mean()


pretrain = sft


def dpo(policy: Rows, reference: Rows, *, beta: float, label_smoothing: float) -> Tensor:
    """Equation 7 of arXiv:2305.18290, smoothed as conservative DPO is."""
    z = beta * (
        (_sums(policy, "chosen") - _sums(reference, "chosen"))
        - (_sums(policy, "rejected") - _sums(reference, "rejected"))
    )
    return (-(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)).mean()


def ipo(policy: Rows, reference: Rows, *, beta: float) -> Tensor:
    """Equation 17 of arXiv:2310.12036, with log-probabilities averaged over the tokens."""
    chosen = _means(policy, "chosen") - _means(reference, "chosen")
    rejected = _means(policy, "rejected") - _means(reference, "rejected")
    return ((chosen - rejected - 1 / (2 * beta)) ** 2).mean()


def kto(
    policy: Rows, reference: Rows, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """Equation 8 of arXiv:2402.01306; the KL is that of mismatched answers, and at least 0."""
    kl = (_sums(policy, "mismatched") - _sums(reference, "mismatched")).mean().clamp(min=0)
    gain = _sums(policy, "completion") - _sums(reference, "completion")
    good = torch.tensor([row.label for row in policy])
    losses = torch.where(
        good,
        desirable_weight * (1 - torch.sigmoid(beta * (gain - kl))),
        undesirable_weight * (1 - torch.sigmoid(beta * (kl - gain))),
    )
    return losses.mean()


def orpo(policy: Rows, _: Rows, *, beta: float) -> Tensor:
    """Equation 6 of arXiv:2403.07691; the likelihood is of prompt and answer, as in the authors' code."""
    nll = -torch.cat([row.whole["chosen"] for row in policy]).mean()
    odds = [torch.log(means.exp() / (1 - means.exp())) for means in map(lambda s: _means(policy, s), PAIR)]
    return nll - beta * logsigmoid(odds[0] - odds[1]).mean()


def simpo(policy: Rows, _: Rows, *, beta: float, gamma: float) -> Tensor:
    """Equation 6 of arXiv:2405.14734."""
    return -logsigmoid(beta * (_means(policy, "chosen") - _means(policy, "rejected")) - gamma).mean()


def reward(policy: Rows, _: Rows, *, center_rewards_coefficient: float) -> Tensor:
    """Equation 1 of arXiv:2203.02155 for pairs, and the centring term of arXiv:2312.09244."""
    chosen, rejected = (torch.stack([row.score[side] for row in policy]) for side in PAIR)
    return (-logsigmoid(chosen - rejected) + center_rewards_coefficient * (chosen + rejected) ** 2).mean()


def grpo(
    policy: Rows,
    reference: Rows,
    *,
    advantages: Tensor,
    beta: float,
    loss_type: str,
    max_completion_length: int,
    **_: Any,
) -> Tensor:
    """Equation 3 of arXiv:2402.03300 on the policy that generated (ratios of 1), by how tokens are averaged:
    grpo over each answer, bnpo and dapo over the batch's tokens, dr_grpo over the longest possible answer.
    """
    losses = []
    for row, frozen, advantage in zip(policy, reference, advantages, strict=True):
        gap = frozen.answers["completion"] - row.answers["completion"]
        losses.append(-advantage + beta * (gap.exp() - gap - 1))
    if loss_type == "grpo":
        return torch.stack([loss.mean() for loss in losses]).mean()
    total = torch.cat(losses)
    return total.sum() / (len(losses) * max_completion_length) if loss_type == "dr_grpo" else total.mean()


def ppo(
    policy: Rows,
    drawn: Rows,
    gained: Sequence[Tensor],
    *,
    cliprange: float,
    vf_coef: float,
) -> Tensor:
    """Equation 7 of arXiv:1707.06347 on whitened advantages, and the squared error of values that have not moved
    since the answers were drawn.

    `gained`: advantages of each answer's tokens, and of the state after it where there is one: (T,) or (T + 1,).
    """
    lengths = [len(row.answers["completion"]) for row in drawn]
    every = torch.cat([gained_T[:n] for gained_T, n in zip(gained, lengths, strict=True)])
    losses = []
    for new, old, gained_T, n in zip(policy, drawn, gained, lengths, strict=True):
        ratio_T = (new.answers["completion"] - old.answers["completion"]).exp()
        white_T = (gained_T[:n] - every.mean()) / (every.var() + 1e-8).sqrt()
        losses.append(torch.max(-white_T * ratio_T, -white_T * ratio_T.clamp(1 - cliprange, 1 + cliprange)))
    errors = torch.cat([gained_T**2 for gained_T in gained])  # return minus value
    return torch.cat(losses).mean() + vf_coef * errors.mean() / 2


def ppo_rewards(
    drawn: Rows, reference: Rows, scores: Sequence[Tensor], *, width: int, kl_coef: float
) -> list[Tensor]:
    """Equation 2 of arXiv:1909.08593 by tokens: the divergence as a price, and the score at the end.

    An answer shorter than `width` is followed by a state of its own, in which the score is given.
    """
    rewards = []
    for old, frozen, score in zip(drawn, reference, scores, strict=True):
        prices_T = -kl_coef * (old.answers["completion"] - frozen.answers["completion"])
        n = len(prices_T)
        rewards_T = torch.cat([prices_T, torch.zeros(min(n + 1, width) - n, dtype=prices_T.dtype)])
        rewards_T[-1] += score
        rewards.append(rewards_T)
    return rewards


def generalized_advantages(rewards_T: Tensor, values_T: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Equation 16 of arXiv:1506.02438, shape (T,)."""
    advantage, following, backwards = 0.0, 0.0, []
    for reward, value in zip(rewards_T.flip(0), values_T.flip(0), strict=True):
        advantage = reward + gamma * following - value + gamma * lam * advantage
        following = value
        backwards.append(advantage)
    return torch.stack(backwards[::-1])


PAIR = ("chosen", "rejected")
