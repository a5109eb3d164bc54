"""`optim=`: the optimizer and its learning-rate schedule."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from soup.specs import OptimSpec, Package

Rate = Annotated[float, Gt(0)]
Decay = Annotated[float, Ge(0)]
Scheduler = Literal["cosine", "linear", "constant"]
Ratio = Annotated[float, Ge(0), Lt(1)]
Moment = Annotated[float, Ge(0), Lt(1)]

EFFECTS = ("optimizer:groups", "optimizer:schedule")
FP32 = 4  # bytes


def adamw(
    *,
    lr: Rate,
    weight_decay: Decay,
    beta1: Moment,
    beta2: Moment,
    eps: Rate,
    scheduler: Scheduler,
    warmup_ratio: Ratio,
) -> OptimSpec:
    """AdamW (arXiv:1711.05101), torch's fused kernel. Two moments per trained parameter, in its dtype."""
    return _spec(
        "adamw_torch_fused",
        lr,
        weight_decay,
        scheduler,
        warmup_ratio,
        state_bytes=2 * FP32,
        args={"adam_beta1": beta1, "adam_beta2": beta2, "adam_epsilon": eps},
        effects=(*EFFECTS, "optimizer:adam"),
    )


def adamw_8bit(
    *,
    lr: Rate,
    weight_decay: Decay,
    beta1: Moment,
    beta2: Moment,
    eps: Rate,
    scheduler: Scheduler,
    warmup_ratio: Ratio,
) -> OptimSpec:
    """AdamW with block-wise 8-bit moments (arXiv:2110.02861, bitsandbytes); tensors below 4096 keep theirs whole."""
    return _spec(
        "adamw_8bit",
        lr,
        weight_decay,
        scheduler,
        warmup_ratio,
        state_bytes=2,
        args={"adam_beta1": beta1, "adam_beta2": beta2, "adam_epsilon": eps},
        requires=_BITSANDBYTES,
        effects=(*EFFECTS, "optimizer:adam"),
    )


def paged_adamw_8bit(
    *,
    lr: Rate,
    weight_decay: Decay,
    beta1: Moment,
    beta2: Moment,
    eps: Rate,
    scheduler: Scheduler,
    warmup_ratio: Ratio,
) -> OptimSpec:
    """8-bit AdamW whose state pages to host memory under pressure (arXiv:2305.14314). CUDA only."""
    return _spec(
        "paged_adamw_8bit",
        lr,
        weight_decay,
        scheduler,
        warmup_ratio,
        state_bytes=2,
        args={"adam_beta1": beta1, "adam_beta2": beta2, "adam_epsilon": eps},
        requires=_BITSANDBYTES,
        effects=(*EFFECTS, "optimizer:adam"),
    )


def adafactor(*, lr: Rate, weight_decay: Decay, scheduler: Scheduler, warmup_ratio: Ratio) -> OptimSpec:
    """Adafactor (arXiv:1804.04235): row and column sums in place of the second moment, no first one.

    The rate is `lr` itself: neither relative to the step nor scaled by the size of the parameter.
    """
    return _spec(
        "adafactor",
        lr,
        weight_decay,
        scheduler,
        warmup_ratio,
        state_bytes=0.1,
        effects=(*EFFECTS, "optimizer:adafactor"),
    )


def lion(
    *,
    lr: Rate,
    weight_decay: Decay,
    beta1: Moment,
    beta2: Moment,
    scheduler: Scheduler,
    warmup_ratio: Ratio,
) -> OptimSpec:
    """Lion (arXiv:2302.06675, bitsandbytes): one moment, the step is its sign."""
    return _spec(
        "lion_32bit",
        lr,
        weight_decay,
        scheduler,
        warmup_ratio,
        state_bytes=FP32,
        args={"adam_beta1": beta1, "adam_beta2": beta2},
        requires=_BITSANDBYTES,
        effects=(*EFFECTS, "optimizer:lion"),
    )


def schedule_free(
    *,
    lr: Rate,
    weight_decay: Decay,
    beta1: Annotated[float, Gt(0), Lt(1)],
    beta2: Moment,
    eps: Rate,
    warmup_ratio: Ratio,
) -> OptimSpec:
    """Schedule-free AdamW (arXiv:2405.15682): averages in place of a decaying rate.

    `beta1`: where between the average and the newest weights gradients are taken.
    """
    return _spec(
        "schedule_free_adamw",
        lr,
        weight_decay,
        "constant",
        warmup_ratio,
        state_bytes=2 * FP32,
        args={"adam_beta1": beta1, "adam_beta2": beta2, "adam_epsilon": eps},
        requires=(Package(distribution="schedulefree", extra="schedulefree"),),
        effects=(*EFFECTS, "optimizer:schedule_free"),
    )


def galore(
    *,
    lr: Rate,
    weight_decay: Decay,
    beta1: Moment,
    beta2: Moment,
    eps: Rate,
    scheduler: Scheduler,
    warmup_ratio: Ratio,
    galore_rank: Annotated[int, Ge(1)],
    galore_update_proj_gap: Annotated[int, Ge(1)],
    galore_scale: Rate,
) -> OptimSpec:
    """GaLore (arXiv:2403.03507): AdamW in a low-rank projection of each weight's gradient."""
    return _spec(
        "galore_adamw",
        lr,
        weight_decay,
        scheduler,
        warmup_ratio,
        state_bytes=2 * FP32,
        galore={"rank": galore_rank, "update_proj_gap": galore_update_proj_gap, "scale": galore_scale},
        args={"adam_beta1": beta1, "adam_beta2": beta2, "adam_epsilon": eps},
        requires=(Package(distribution="galore-torch", extra="galore"), *_BITSANDBYTES),  # which it imports
        effects=(*EFFECTS, "optimizer:galore"),
    )


def muon(
    *,
    lr: Rate,
    weight_decay: Decay,
    momentum: Moment,
    nesterov: bool,
    ns_steps: Annotated[int, Ge(1), Lt(100)],
    scheduler: Scheduler,
    warmup_ratio: Ratio,
) -> OptimSpec:
    """Muon (Jordan 2024, arXiv:2502.16982): each matrix's momentum, orthogonalised by Newton and Schulz's iteration.

    `ns_steps`: of that iteration. What is no matrix of a hidden layer trains with AdamW (betas 0.9 and 0.999).
    """
    return _spec(
        "adamw_torch_fused",  # of transformers' optimizers; soup.train.optimizers makes this one
        lr,
        weight_decay,
        scheduler,
        warmup_ratio,
        state_bytes=FP32,
        muon={"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps},
        effects=(*EFFECTS, "optimizer:muon"),
    )


_BITSANDBYTES = (Package(distribution="bitsandbytes", extra="quant"),)


def _spec(
    optim: str,
    lr: float,
    weight_decay: float,
    scheduler: str,
    warmup_ratio: float,
    *,
    state_bytes: float,
    args: dict[str, Any] | None = None,
    requires: tuple[Package, ...] = (),
    effects: tuple[str, ...] = EFFECTS,
    galore: dict[str, Any] | None = None,
    muon: dict[str, Any] | None = None,
) -> OptimSpec:
    return OptimSpec(
        lr=lr,
        weight_decay=weight_decay,
        scheduler=scheduler,
        warmup_ratio=warmup_ratio,
        state_bytes=state_bytes,
        galore=galore,
        muon=muon,
        args={
            "optim": optim,
            "learning_rate": lr,
            "weight_decay": weight_decay,
            "lr_scheduler_type": scheduler if scheduler != "constant" else "constant_with_warmup",
            "warmup_steps": warmup_ratio,  # transformers 5 reads a value below 1 as a share of all steps
            **(args or {}),
        },
        requires=requires,
        effects=effects,
    )
