"""The `training` section: how long, how much at once, from which seed, and with which features."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from soup.specs import Package, TrainingSpec

Count = Annotated[int, Ge(1)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]


def training(
    *,
    epochs: Annotated[float, Gt(0)],
    max_steps: Count | None,
    batch_size: Count,
    gradient_accumulation_steps: Count,
    max_grad_norm: Annotated[float, Ge(0)],
    logging_steps: Count,
    save_steps: Count,
    eval_steps: Count,
    seed: Seed,
    data_seed: Seed | None,
    gradient_checkpointing: bool,
    packing: bool,
    use_liger: bool,
    use_flash_attn: Literal["auto", "off", "v2", "v3"],
    neftune_alpha: Annotated[float, Ge(0), Le(50)],
    moe_lora: bool,
    moe_aux_loss_coeff: Annotated[float, Ge(0)] | None,
    curriculum: bool,
    curriculum_metric: Literal["length", "difficulty", "loss"],
    curriculum_buckets: Annotated[int, Ge(1), Le(20)],
    freeze_layers: Annotated[int, Ge(0)],
    freeze_ratio: Annotated[float, Ge(0), Le(1)],
    loss_watchdog: bool,
    loss_watchdog_threshold: Annotated[float, Gt(0)],
    loss_watchdog_patience: Count,
    loss_watchdog_action: Literal["stop", "rollback"],
) -> TrainingSpec:
    """Lengths are in optimizer steps or epochs; `batch_size` is rows per device and micro-step."""
    data_seed = seed if data_seed is None else data_seed
    return TrainingSpec(
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        max_grad_norm=max_grad_norm,
        logging_steps=logging_steps,
        save_steps=save_steps,
        eval_steps=eval_steps,
        seed=seed,
        data_seed=data_seed,
        gradient_checkpointing=gradient_checkpointing,
        packing=packing,
        use_liger=use_liger,
        use_flash_attn=use_flash_attn,
        neftune_alpha=neftune_alpha,
        freeze_layers=freeze_layers,
        freeze_ratio=freeze_ratio,
        loss_watchdog=loss_watchdog,
        loss_watchdog_threshold=loss_watchdog_threshold,
        loss_watchdog_patience=loss_watchdog_patience,
        loss_watchdog_action=loss_watchdog_action,
        curriculum=curriculum,
        curriculum_metric=curriculum_metric,
        curriculum_buckets=curriculum_buckets,
        moe_lora=moe_lora,
        moe_aux_loss_coeff=moe_aux_loss_coeff,
        args={
            "num_train_epochs": epochs,
            "max_steps": -1 if max_steps is None else max_steps,
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "max_grad_norm": max_grad_norm,
            "logging_steps": logging_steps,
            "save_steps": save_steps,
            "eval_steps": eval_steps,
            "seed": seed,
            "data_seed": data_seed,
            "gradient_checkpointing": gradient_checkpointing,
            **({"packing": True} if packing else {}),
            **({"use_liger_kernel": True} if use_liger else {}),
        },
        requires=(Package(distribution="liger-kernel", extra="liger"),) if use_liger else (),
        effects=(
            "loop:length",
            "loop:batch",
            "accumulation:divided",
            "loop:clipping",
            "loop:seed",
            "loop:data_order",
            "curriculum:curriculum",
            "loop:intervals",
            "loop:gradient_checkpointing",
            "loop:neftune",
            "loop:freezing",
            "watchdog:watchdog",
            "moe:experts",
            "moe:balancing",
            "data:packing",
            "kernels:attention",
            "kernels:liger",
        ),
    )
