"""`task=`: what is learnt. Each function maps a task's own knobs to TRL's trainer and arguments."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

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
        effects=("data:label_mask",),
    )


def pretrain() -> TaskSpec:
    """Next-token prediction on plain text, every token learnt, an end-of-text token after each document."""
    return TaskSpec(
        trainer="trl:SFTTrainer",
        config="trl:SFTConfig",
        shape="text",
        embedded="text",
        args={"dataset_kwargs": {"skip_prepare_dataset": True}},
        effects=("data:label_mask",),
    )


def dpo(*, beta: Beta, label_smoothing: Annotated[float, Ge(0), Le(0.5)], precompute_ref: bool) -> TaskSpec:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290). `beta`: strength of the pull to the reference."""
    return TaskSpec(
        trainer="trl:DPOTrainer",
        config="trl:DPOConfig",
        shape="preference",
        embedded="preference",
        forwards=2,
        reference=True,
        precompute_ref=precompute_ref,
        args={
            "loss_type": ["sigmoid"],
            "beta": beta,
            "label_smoothing": label_smoothing,
            "precompute_ref_log_probs": precompute_ref,
        },
    )


def ipo(*, beta: Beta, precompute_ref: bool) -> TaskSpec:
    """IPO (Azar et al. 2023, arXiv:2310.12036). `beta` is the paper's tau: the target margin is 1/(2 beta)."""
    return TaskSpec(
        trainer="trl:DPOTrainer",
        config="trl:DPOConfig",
        shape="preference",
        embedded="preference",
        forwards=2,
        reference=True,
        precompute_ref=precompute_ref,
        args={"loss_type": ["ipo"], "beta": beta, "precompute_ref_log_probs": precompute_ref},
    )


def kto(*, beta: Beta, desirable_weight: Beta, undesirable_weight: Beta, precompute_ref: bool) -> TaskSpec:
    """KTO (Ethayarajh et al. 2024, arXiv:2402.01306). The weights are the paper's lambda_D and lambda_U."""
    return TaskSpec(
        trainer="trl:KTOTrainer",
        config="trl:KTOConfig",
        shape="unpaired",
        embedded="unpaired",
        forwards=2,  # the completion, and a mismatched one for the KL estimate
        reference=True,
        precompute_ref=precompute_ref,
        args={
            "loss_type": "kto",
            "beta": beta,
            "desirable_weight": desirable_weight,
            "undesirable_weight": undesirable_weight,
            "precompute_ref_log_probs": precompute_ref,
        },
    )


def orpo(*, beta: Beta) -> TaskSpec:
    """ORPO (Hong et al. 2024, arXiv:2403.07691). `beta` is the paper's lambda, the odds-ratio term's weight."""
    return TaskSpec(
        trainer="trl.experimental.orpo:ORPOTrainer",
        config="trl.experimental.orpo:ORPOConfig",
        shape="preference",
        embedded="preference",
        forwards=2,
        args={"beta": beta},
    )


def simpo(*, beta: Beta, gamma: Annotated[float, Ge(0)]) -> TaskSpec:
    """SimPO (Meng et al. 2024, arXiv:2405.14734). `gamma`: target reward margin, in nats per token."""
    return TaskSpec(
        trainer="trl.experimental.cpo:CPOTrainer",
        config="trl.experimental.cpo:CPOConfig",
        shape="preference",
        embedded="preference",
        forwards=2,
        args={"loss_type": "simpo", "cpo_alpha": 0.0, "beta": beta, "simpo_gamma": gamma},
    )


def grpo(
    *,
    rewards: list[str],
    reward_weights: list[float] | None,
    num_generations: Annotated[int, Ge(2)],
    max_completion_length: Count,
    temperature: Annotated[float, Gt(0)],
    beta: Annotated[float, Ge(0)],
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"],
) -> TaskSpec:
    """GRPO (Shao et al. 2024, arXiv:2402.03300). `beta`: weight of the KL to the reference, 0 loads none."""
    return TaskSpec(
        trainer="trl:GRPOTrainer",
        config="trl:GRPOConfig",
        shape="prompt",
        embedded="prompts",
        max_length=None,
        forwards=2,
        reference=beta > 0,
        args={
            "num_generations": num_generations,
            "max_completion_length": max_completion_length,
            "temperature": temperature,
            "beta": beta,
            "loss_type": loss_type,
            "reward_weights": reward_weights,
        },
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
        trainer="trl.experimental.ppo:PPOTrainer",
        config="trl.experimental.ppo:PPOConfig",
        shape="prompt",
        embedded="prompts",
        max_length=None,
        forwards=4,
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
    )
