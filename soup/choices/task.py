"""`task=`: what is learnt. Each function maps a task's own knobs to TRL's trainer and arguments."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from soup.rewards import files
from soup.specs import TaskSpec

Beta = Annotated[float, Gt(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(1)]


def sft() -> TaskSpec:
    """Supervised fine-tuning on conversations; the loss falls on assistant turns only."""
    return TaskSpec(
        trainer="trl:SFTTrainer",
        config="trl:SFTConfig",
        shape="conversation",
        embedded="keeper",
        args={"dataset_kwargs": {"skip_prepare_dataset": True}},
        effects=("data:label_mask", "task:loss"),
    )


def pretrain() -> TaskSpec:
    """Next-token prediction on plain text, every token learnt, an end-of-text token after each document."""
    return TaskSpec(
        trainer="trl:SFTTrainer",
        config="trl:SFTConfig",
        shape="text",
        embedded="text",
        args={"dataset_kwargs": {"skip_prepare_dataset": True}},
        effects=("data:label_mask", "task:loss"),
    )


def dpo(*, beta: Beta, label_smoothing: Annotated[float, Ge(0), Lt(0.5)], precompute_ref: bool) -> TaskSpec:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290). `beta`: strength of the pull to the reference.

    `label_smoothing`: the share e of pairs that are taken for mislabelled, conservative DPO's (1 - e) L(z) +
    e L(-z) (arXiv:2305.18290v3, appendix; Mitchell 2023). TRL 1.12 ignores it in its sigmoid loss; its robust loss
    is ((1 - e) L(z) - e L(-z)) / (1 - 2e), so that 2 (1 - e) sigmoid - (1 - 2e) robust is the conservative one.
    """
    smooth = label_smoothing
    return TaskSpec(
        trainer="soup.train.trainers:DPO",
        config="trl:DPOConfig",
        extra="extra:reference",
        shape="preference",
        embedded="preference",
        forwards=2,
        reference=True,
        precompute_ref=precompute_ref,
        args={
            "loss_type": ["sigmoid", "robust"] if smooth else ["sigmoid"],
            "loss_weights": [2 * (1 - smooth), -(1 - 2 * smooth)] if smooth else [1.0],
            "beta": beta,
            "label_smoothing": smooth,
            "precompute_ref_log_probs": precompute_ref,
            "disable_dropout": False,
        },
        effects=("task:loss", "task:reference"),
    )


def ipo(*, beta: Beta, precompute_ref: bool) -> TaskSpec:
    """IPO (Azar et al. 2023, arXiv:2310.12036). `beta` is the paper's tau: the target margin is 1/(2 beta).

    TRL's log-probabilities are averages over the answer's tokens, as the paper's authors confirmed to TRL.
    """
    return TaskSpec(
        trainer="soup.train.trainers:DPO",
        config="trl:DPOConfig",
        extra="extra:reference",
        shape="preference",
        embedded="preference",
        forwards=2,
        reference=True,
        precompute_ref=precompute_ref,
        args={
            "loss_type": ["ipo"],
            "beta": beta,
            "precompute_ref_log_probs": precompute_ref,
            "disable_dropout": False,
        },
        effects=("task:loss", "task:reference"),
    )


def kto(*, beta: Beta, desirable_weight: Beta, undesirable_weight: Beta, precompute_ref: bool) -> TaskSpec:
    """KTO (Ethayarajh et al. 2024, arXiv:2402.01306). The weights are the paper's lambda_D and lambda_U."""
    return TaskSpec(
        trainer="soup.train.trainers:KTO",
        config="trl:KTOConfig",
        extra="extra:reference",
        shape="unpaired",
        embedded="unpaired",
        forwards=2,
        unlearnt=1,  # a mismatched completion for the KL estimate
        reference=True,
        precompute_ref=precompute_ref,
        args={
            "loss_type": "kto",
            "beta": beta,
            "desirable_weight": desirable_weight,
            "undesirable_weight": undesirable_weight,
            "precompute_ref_log_probs": precompute_ref,
            "disable_dropout": False,
        },
        effects=("task:loss", "task:reference"),
    )


def orpo(*, beta: Beta) -> TaskSpec:
    """ORPO (Hong et al. 2024, arXiv:2403.07691). `beta` is the paper's lambda, the odds-ratio term's weight."""
    return TaskSpec(
        trainer="soup.train.trainers:ORPO",
        config="trl.experimental.orpo:ORPOConfig",
        shape="preference",
        embedded="preference",
        forwards=2,
        args={"beta": beta, "disable_dropout": False, "remove_unused_columns": False},
        effects=("task:loss",),
    )


def simpo(*, beta: Beta, gamma: Annotated[float, Ge(0)]) -> TaskSpec:
    """SimPO (Meng et al. 2024, arXiv:2405.14734). `gamma`: target reward margin, in nats per token."""
    return TaskSpec(
        trainer="soup.train.trainers:CPO",
        config="trl.experimental.cpo:CPOConfig",
        shape="preference",
        embedded="preference",
        forwards=2,
        args={
            "loss_type": "simpo",
            "cpo_alpha": 0.0,
            "beta": beta,
            "simpo_gamma": gamma,
            "disable_dropout": False,
            "remove_unused_columns": False,
        },
        effects=("task:loss",),
    )


def reward(*, center_rewards_coefficient: Annotated[float, Ge(0)]) -> TaskSpec:
    """A reward model from pairs (Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155), as PPO needs one.

    `center_rewards_coefficient`: weight of the squared sum of a pair's rewards (arXiv:2312.09244).
    """
    return TaskSpec(
        trainer="soup.train.trainers:Reward",
        config="trl:RewardConfig",
        shape="preference",
        embedded="preference",
        head="score",
        balances=False,
        forwards=2,
        args={"center_rewards_coefficient": center_rewards_coefficient or None, "disable_dropout": False},
        effects=("task:loss",),
    )


def grpo(
    *,
    rewards: Annotated[list[str], MinLen(1)],
    reward_weights: list[float] | None,
    num_generations: Annotated[int, Ge(2)],
    max_completion_length: Count,
    temperature: Annotated[float, Gt(0)],
    beta: Annotated[float, Ge(0)],
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"],
) -> TaskSpec:
    """GRPO (Shao et al. 2024, arXiv:2402.03300). `beta`: weight of the KL to the reference, 0 loads none."""
    return TaskSpec(
        trainer="soup.train.trainers:GRPO",
        config="trl:GRPOConfig",
        extra="extra:reward_functions",
        shape="prompt",
        embedded="prompts",
        max_length=None,
        samples=num_generations,
        rewards=tuple(rewards),
        files=tuple(map(str, files(rewards))),
        generates=max_completion_length,
        drop_last=True,
        reference=beta > 0,
        args={
            "num_generations": num_generations,
            "max_completion_length": max_completion_length,
            "temperature": temperature,
            "beta": beta,
            "loss_type": loss_type,
            "reward_weights": reward_weights,
        },
        effects=("task:group_loss", "answers:sampled", "answers:scored"),
    )


def ppo(
    *,
    reward_model: str | None,
    value_model: str | None,
    response_length: Count,
    temperature: Annotated[float, Gt(0)],
    kl_coef: Annotated[float, Ge(0)],
    num_ppo_epochs: Count,
    cliprange: Annotated[float, Gt(0)],
    vf_coef: Annotated[float, Ge(0)],
    gamma: Fraction,
    lam: Fraction,
) -> TaskSpec:
    """PPO (Ziegler et al. 2019, arXiv:1909.08593). `lam`: GAE's lambda (arXiv:1506.02438)."""
    return TaskSpec(
        trainer="soup.train.ppo:PPO",
        config="trl.experimental.ppo:PPOConfig",
        extra="extra:ppo_models",
        shape="prompt",
        embedded="prompts",
        max_length=None,
        drop_last=True,
        generates=response_length,
        files=tuple(model for model in (reward_model, value_model) if model is not None),
        frozen_models=1,
        trained_models=1,
        balances=False,
        evaluates=False,
        reference=True,
        args={
            "response_length": response_length,
            "temperature": temperature,
            "kl_coef": kl_coef,
            "num_ppo_epochs": num_ppo_epochs,
            "cliprange": cliprange,
            "vf_coef": vf_coef,
            "gamma": gamma,
            "lam": lam,
        },
        effects=("ppo:update", "ppo:scorers"),
    )
