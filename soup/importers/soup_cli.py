"""soup-cli's soup.yaml, as its 0.77 reads it (soup_cli.config.schema)."""

from __future__ import annotations

from typing import Any

from soup.importers import reasons
from soup.importers.mapping import (
    OPTIMIZER,
    PLACE,
    SCHEDULER,
    Choose,
    Entry,
    File,
    Leave,
    Outcome,
    Put,
    Same,
    Tool,
    at,
    each,
    flag,
    leave,
    nothing,
    same,
    switch,
    targets,
    to,
    when,
    whole,
)

TASKS = {name: name for name in ("sft", "dpo", "ipo", "kto", "orpo", "simpo", "grpo", "ppo", "pretrain")}
TASKS["reward_model"] = "reward"
FORMATS = {
    "auto": "auto",
    "alpaca": "alpaca",
    "sharegpt": "sharegpt",
    "chatml": "messages",
    "dpo": "preference",
    "kto": "unpaired",
    "plaintext": "text",
}


def _task(file: File) -> str:
    return str(at(file, "task", "sft"))


def _of(*tasks: str, entry: Entry) -> Entry:
    """A key that only these tasks read."""
    return when(lambda file: _task(file) in tasks, entry, f"read by task {' and '.join(tasks)} only")


def _on(name: str) -> Any:
    return lambda file: bool(at(file, f"training.{name}", False))


def _adapters(file: File) -> bool:
    return at(file, "training.lora.r", 64) != 0 and not at(file, "training.use_galore", False)


def _lora(entry: Entry) -> Entry:
    return when(_adapters, entry, "all weights train, without adapters")


def _batch(value: Any, _: File) -> list[Outcome]:
    if value == "auto":
        why = "soup looks for no batch size: training.batch_size=N, and `soup plan` says what memory it takes"
        return [Leave(why)]
    return [Put("training.batch_size", whole(value))]


def _modules(value: Any, _: File) -> list[Outcome]:
    if value == "auto":
        return [
            Leave(
                "PEFT's own choice for the model; soup takes all linear layers, or lora.target_modules=[...]"
            )
        ]
    return targets(value)


def _qat(value: Any, _: File) -> list[Outcome]:
    if isinstance(value, str):
        return [Leave("soup simulates integers of 4 or 8 bits, and no other format")]
    return [Put("model.quantization_aware", flag(value))]


def _reward(value: Any, _: File) -> list[Outcome]:
    return [
        Leave(
            f"{value} is a function of soup-cli's: task.rewards=[exact_match], numeric, or FILE.py:FUNCTION"
        )
    ]


def _ring(value: Any, _: File) -> list[Outcome]:
    if not flag(value):
        return [Put("longctx.use_ring_attention", False)]
    why = "how many devices share a sequence is not in this file: "
    why += "distributed=ddp distributed.processes=N longctx.ring_size=N"
    return [Put("longctx.use_ring_attention", True), Leave(why)]


TABLE: dict[str, Entry] = reasons.SOUP_CLI | {
    "base": lambda value, _: [Choose("model", "hub"), Put("model.base", str(value))],
    "task": each(
        {key: Choose("task", name) for key, name in TASKS.items()},
        "soup has no such task, and trains sft as this stands",
    ),
    "modality": same("text", why="soup trains on text", otherwise="soup trains on text only"),
    "backend": each(
        {name: Choose("backend", name) for name in ("transformers", "unsloth")},
        "soup has no such backend, and takes transformers",
    ),
    "output": to("run.root"),
    "experiment_name": to("run.name"),
    "data.train": lambda value, _: [Put("data.train", value)],
    "data.format": each(
        {key: Put("data.format", name) for key, name in FORMATS.items()}, "soup reads no such format"
    ),
    "data.max_length": to("data.max_length", whole),
    "data.val_split": when(
        lambda file: _task(file) != "ppo",
        to("data.eval_fraction", float),
        "TRL's PPO trainer does not evaluate",
    ),
    "data.streaming": switch("data.streaming"),
    "data.chat_template": to("model.chat_template"),
    "data.train_on_responses_only": same(
        True,
        why="the loss falls on answers only",
        otherwise="soup learns what the assistant says, and no prompts",
    ),
    "training.epochs": to("training.epochs", float),
    "training.lr": to("optim.lr", float),
    "training.batch_size": _batch,
    "training.gradient_accumulation_steps": to("training.gradient_accumulation_steps", whole),
    "training.seed": to("training.seed", whole),
    "training.data_seed": to("training.data_seed", whole),
    "training.warmup_ratio": to("optim.warmup_ratio", float),
    "training.weight_decay": to("optim.weight_decay", float),
    "training.max_grad_norm": to("training.max_grad_norm", float),
    "training.optimizer": when(
        lambda file: not at(file, "training.use_galore", False), OPTIMIZER, "use_galore chooses the optimizer"
    ),
    "training.scheduler": SCHEDULER,
    "training.save_steps": to("training.save_steps", whole),
    "training.logging_steps": to("training.logging_steps", whole),
    "training.eval_steps": to("training.eval_steps", whole),
    "training.quantization": each(
        {name: Put("model.quantization", name) for name in ("none", "4bit", "8bit")},
        "soup has none, 4bit and 8bit",
    ),
    "training.quantization_aware": _qat,
    "training.lora.r": lambda value, file: (
        [Choose("lora", "lora"), Put("lora.r", whole(value))] if _adapters(file) else [Choose("lora", "none")]
    ),
    "training.lora.alpha": _lora(to("lora.alpha", float)),
    "training.lora.dropout": _lora(to("lora.dropout", float)),
    "training.lora.target_modules": _lora(_modules),
    "training.lora.use_dora": _lora(switch("lora.use_dora")),
    "training.lora.use_rslora": _lora(switch("lora.use_rslora")),
    "training.loraplus_lr_ratio": _lora(to("lora.loraplus_lr_ratio", float)),
    "training.use_galore": lambda value, _: (
        [Choose("optim", "galore"), Choose("lora", "none")] if flag(value) else [Same("another optimizer")]
    ),
    "training.galore_rank": when(_on("use_galore"), to("optim.galore_rank", whole), "use_galore is off"),
    "training.galore_update_proj_gap": when(
        _on("use_galore"), to("optim.galore_update_proj_gap", whole), "use_galore is off"
    ),
    "training.galore_scale": when(_on("use_galore"), to("optim.galore_scale", float), "use_galore is off"),
    "training.neftune_alpha": to("training.neftune_alpha", float),
    "training.use_liger": switch("training.use_liger"),
    "training.use_flash_attn": each(
        {True: Put("training.use_flash_attn", "auto"), False: Put("training.use_flash_attn", "off")},
        "is neither true nor false",
    ),
    "training.gradient_checkpointing": each(
        {value: Put("training.gradient_checkpointing", value) for value in (True, False)},
        "soup recomputes all layers or none: training.gradient_checkpointing=true",
    ),
    "training.rope_scaling_type": each(
        {name: Choose("longctx", name) for name in ("linear", "dynamic", "yarn", "llama3", "longrope")},
        "soup has no such scaling",
    ),
    "training.yarn_factor": to("longctx.rope_factor", float),
    "training.yarn_beta_fast": to("longctx.beta_fast", float),
    "training.yarn_beta_slow": to("longctx.beta_slow", float),
    "training.use_ring_attention": _ring,
    "training.moe_lora": switch("training.moe_lora"),
    "training.moe_aux_loss_coeff": to("training.moe_aux_loss_coeff", float),
    "training.curriculum": switch("training.curriculum"),
    "training.curriculum_metric": when(
        _on("curriculum"),
        # A row's perplexity is the exponential of its loss, so the order is the same.
        each(
            {
                name: Put("training.curriculum_metric", kind)
                for name, kind in (("length", "length"), ("loss", "loss"), ("perplexity", "loss"))
            },
            "soup has length, difficulty and loss",
        ),
        "curriculum is off",
    ),
    "training.curriculum_buckets": when(
        _on("curriculum"), to("training.curriculum_buckets", whole), "curriculum is off"
    ),
    "training.freeze_layers": to("training.freeze_layers", whole),
    "training.freeze_ratio": to("training.freeze_ratio", float),
    "training.loss_watchdog": switch("training.loss_watchdog"),
    "training.loss_watchdog_threshold": when(
        _on("loss_watchdog"), to("training.loss_watchdog_threshold", float), "loss_watchdog is off"
    ),
    "training.loss_watchdog_patience": when(
        _on("loss_watchdog"), to("training.loss_watchdog_patience", whole), "loss_watchdog is off"
    ),
    "training.packing": switch("training.packing"),
    "training.dpo_beta": _of("dpo", entry=to("task.beta", float)),
    "training.ipo_tau": _of("ipo", entry=to("task.beta", float)),
    "training.kto_beta": _of("kto", entry=to("task.beta", float)),
    "training.orpo_beta": _of("orpo", entry=to("task.beta", float)),
    "training.simpo_gamma": _of("simpo", entry=to("task.gamma", float)),
    "training.cpo_alpha": _of(
        "simpo", entry=leave("SimPO (arXiv:2405.14734) has no likelihood term beside it")
    ),
    "training.grpo_beta": _of("grpo", entry=to("task.beta", float)),
    "training.num_generations": _of("grpo", entry=to("task.num_generations", whole)),
    "training.reward_fn": _of("grpo", entry=_reward),
    "training.reward_model": _of("ppo", entry=to("task.reward_model")),
    "training.ppo_epochs": _of("ppo", entry=to("task.num_ppo_epochs", whole)),
    "training.ppo_clip_ratio": _of("ppo", entry=to("task.cliprange", float)),
    "training.ppo_kl_penalty": _of("ppo", entry=to("task.kl_coef", float)),
    "eval": leave(f"soup evaluates the loss while training (training.eval_steps); {PLACE}"),
    "training.bnb_4bit_use_double_quant": same(
        True, why="soup quantizes 4-bit scales too", otherwise="soup quantizes 4-bit scales too"
    ),
    "training.warmup_auto": same(False, why="off", otherwise="optim.warmup_ratio says how long it is"),
    "training.auto_mixed_precision": nothing("model.dtype=auto takes bfloat16 where the hardware has it"),
}


def _defaults(file: File) -> dict[str, Any]:
    values: dict[str, Any] = {
        "task": "sft",
        "data.max_length": 2048,
        "data.val_split": 0.1,
        "training.epochs": 3,
        "training.lr": 2e-5,
        "training.gradient_accumulation_steps": 4,
        "training.warmup_ratio": 0.03,
        "training.weight_decay": 0.01,
        "training.max_grad_norm": 1.0,
        "training.scheduler": "cosine",
        "training.save_steps": 100,
        "training.logging_steps": 10,
        "training.quantization": "4bit",
        "training.lora.r": 64,
        "training.lora.alpha": 16,
        "training.lora.dropout": 0.05,
        "training.use_flash_attn": False,
    }
    if at(file, "training.loss_watchdog", False):
        values |= {"training.loss_watchdog_threshold": 3.0, "training.loss_watchdog_patience": 5}
    if _task(file) == "grpo":
        values |= {"training.grpo_beta": 0.1, "training.num_generations": 4}
    if _task(file) == "ppo":  # whose trainer in TRL turns dropout off
        values["training.lora.dropout"] = 0.0
    if _task(file) == "simpo":
        values["training.simpo_gamma"] = 0.5
    return values


SOUP_CLI = Tool(
    name="soup-cli",
    version="0.77",
    model="base",
    table=TABLE,
    defaults=_defaults,
)
