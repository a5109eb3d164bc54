"""axolotl's YAML, as its 0.19 reads it (axolotl.utils.schemas)."""

from __future__ import annotations

from typing import Any

from soup.importers import reasons
from soup.importers.axolotl_rows import datasets, held_out_files, held_out_share, pretraining
from soup.importers.mapping import (
    HUB,
    LOADER,
    OPTIMIZER,
    PLACE,
    RESUME,
    SCHEDULER,
    TIMEOUT,
    Choose,
    Entry,
    File,
    Leave,
    Outcome,
    Put,
    Same,
    Tool,
    at,
    counted,
    deepspeed,
    each,
    flag,
    leave,
    nothing,
    same,
    switch,
    targets,
    to,
    warmup_steps,
    when,
    whole,
)

TASKS = {name: name for name in ("dpo", "ipo", "orpo", "kto", "simpo", "grpo")}
SPEED = "how it is computed, not what is learnt"
TOKENS = "soup takes the tokenizer as it is: save one with these tokens beside the model"


def _lora(entry: Entry) -> Entry:
    return when(lambda file: at(file, "adapter"), entry, "there is no adapter: all weights train")


def _of(*tasks: str, entry: Entry) -> Entry:
    return when(lambda file: at(file, "rl") in tasks, entry, f"read by rl {' and '.join(tasks)} only")


def _adapter(value: Any, _: File) -> list[Outcome]:
    if value in ("lora", "qlora"):
        return [Choose("lora", "lora")]
    return [Leave("soup has LoRA, which it trains as this stands, and all weights")]


def _quantization_aware(value: Any, _: File) -> list[Outcome]:
    bits = {"int4": "4bit", "int8": "8bit"}.get(str(value.get("weight_dtype", "int8")))
    if bits is None:
        return [Leave("soup learns with weights as integers of 4 or 8 bits")]
    found: list[Outcome] = [Put("model.quantization", bits), Put("model.quantization_aware", True)]
    if "group_size" in value:
        found.append(Put("model.quantization_group_size", whole(value["group_size"])))
    if left := sorted(set(value) - {"weight_dtype", "group_size"}):
        found.append(
            Leave(f"soup rounds the weights of linear layers, from the first step on ({', '.join(left)})")
        )
    return found


def _bits(name: str) -> Entry:
    return lambda value, _: [Put("model.quantization", name)] if flag(value) else [Same("off")]


def _bf16(value: Any, _: File) -> list[Outcome]:
    if value in ("auto", "full"):
        return [Put("model.dtype", "auto" if value == "auto" else "bfloat16")]
    return [Put("model.dtype", "bfloat16")] if flag(value) else [Same("off")]


def _fp16(value: Any, _: File) -> list[Outcome]:
    return [Put("model.dtype", "float16")] if value not in ("auto", False) and flag(value) else [Same("off")]


def _fsdp(value: Any, file: File) -> list[Outcome]:
    config = at(file, "fsdp_config", {})
    offloads = any(config.get(key) for key in ("fsdp_offload_params", "offload_params"))
    after = config.get("reshard_after_forward", config.get("fsdp_reshard_after_forward", True))
    strategy = str(config.get("fsdp_sharding_strategy", "FULL_SHARD"))
    keeps = after is False or strategy == "SHARD_GRAD_OP" or "shard_grad_op" in (value or [])
    return [
        Choose(
            "distributed",
            "fsdp_full_offload" if offloads else "fsdp_shard_grad" if keeps else "fsdp_full_shard",
        )
    ]


def _fsdp_config(_: Any, file: File) -> list[Outcome]:
    return [Same("how it shards")] if at(file, "fsdp") else _fsdp([], file)


def _evenly(name: str) -> Entry:
    return leave(f"soup counts steps, and how many an epoch has is not in this file: training.{name}_steps")


def _plugins(value: Any, _: File) -> list[Outcome]:
    others = [str(one) for one in value if "liger" not in str(one).lower()]
    return (
        [Leave(f"soup has no such plugin: {', '.join(others)}")]
        if others
        else [Same("the liger_ keys say which kernels")]
    )


LIGER_KEYS = (
    "liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_swiglu", "liger_layer_norm",
    "liger_cross_entropy", "liger_fused_linear_cross_entropy",
)  # fmt: skip


def _liger(value: Any, _: File) -> list[Outcome]:
    return (
        [Put("training.use_liger", True)]
        if flag(value)
        else [Leave("soup takes Liger's kernels all, or none")]
    )


def _flash(value: Any, _: File) -> list[Outcome]:
    known = {
        "flash_attention_2": "v2", "flash_attention_3": "v3", "flash": "auto", "sdpa": "off",
        True: "auto", False: "off",
    }  # fmt: skip
    if not isinstance(value, str | bool) or value not in known:
        return [Leave("soup has FlashAttention 2 and 3, and torch's own attention")]
    return [Put("training.use_flash_attn", known[value])]


def _rope(value: Any, _: File) -> list[Outcome]:
    kind = value.get("rope_type", value.get("type"))
    if kind not in ("linear", "dynamic", "yarn", "llama3"):
        return [Leave("soup has linear, dynamic, yarn and llama3 with a factor")]
    found: list[Outcome] = [Choose("longctx", kind)]
    if "factor" in value:
        found.append(Put("longctx.rope_factor", float(value["factor"])))
    for key in ("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
        if key in value:
            found.append(Put(f"longctx.{key}", float(value[key])))
    known = {"rope_type", "type", "factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"}
    if left := set(value) - known:
        found.append(Leave(f"the model's own config.json says {', '.join(sorted(left))}"))
    return found


# What switches each tracker on.
TRACKERS = {
    "wandb": ("wandb_project", "use_wandb"),
    "mlflow": ("mlflow_experiment_name", "use_mlflow"),
    "trackio": ("trackio_project_name", "use_trackio"),
    "tensorboard": ("use_tensorboard",),
}


def _tracking(file: File) -> list[tuple[str, Outcome]]:
    """Several at once, where the file has several."""
    on = {
        name: next(key for key in keys if at(file, key))
        for name, keys in TRACKERS.items()
        if any(at(file, key) for key in keys) and at(file, keys[-1], True)
    }
    names = f"[{','.join(on)}]" if len(on) > 1 else "".join(on)
    return [(", ".join(on.values()), Choose("tracking", names))] if on else []


def _tracked(name: str, key: str) -> Entry:
    return when(
        lambda file: at(file, TRACKERS[name][0]) and at(file, TRACKERS[name][-1], True),
        to(f"tracking.{name}.{key}"),
        f"{name} does not follow",
    )


def _ring(value: Any, _: File) -> list[Outcome]:
    if whole(value) <= 1:
        return [Same("one device has a whole sequence")]
    return [
        Put("longctx.use_ring_attention", True),
        Put("longctx.ring_size", whole(value)),
        Choose("distributed", "ddp"),
    ]


ATTENTION = each(
    {False: Same("off"), True: Leave("soup has FlashAttention, and torch's own attention")}, "unknown"
)
TABLE: dict[str, Entry] = reasons.AXOLOTL | {
    "base_model": lambda value, _: [Choose("model", "hub"), Put("model.base", str(value))],
    "base_model_config": leave("soup reads the model's own config.json"),
    "model_type": nothing("the model's config.json says it"),
    "tokenizer_type": nothing("the tokenizer's files say it"),
    "tokenizer_config": leave("soup takes the model's own tokenizer"),
    "processor_type": leave("soup trains on text"),
    "is_llama_derived_model": nothing("the model's config.json says it"),
    "trust_remote_code": switch("model.trust_remote_code"),
    "revision_of_model": to("model.revision"),
    "overrides_of_model_config.rope_scaling": _rope,
    "overrides_of_model_config.rope_parameters": _rope,
    "load_in_4bit": _bits("4bit"),
    "load_in_8bit": _bits("8bit"),
    "qat": _quantization_aware,
    "rl": each(
        {key: Choose("task", name) for key, name in TASKS.items()},
        "soup has no such task, and trains sft as this stands",
    ),
    "reward_model": each({True: Choose("task", "reward"), False: Same("off")}, "is neither true nor false"),
    "datasets": datasets,
    "test_datasets": held_out_files,
    "pretraining_dataset": pretraining,
    "chat_template": each(
        {"tokenizer_default": Same("the tokenizer's own")},
        "soup renders with the tokenizer's own template, or model.chat_template=FILE",
    ),
    "chat_template_jinja": to("model.chat_template"),
    "dataset_prepared_path": nothing("soup keeps tokens in its cache, by content"),
    "dataset_processes": nothing(LOADER),
    "dataset_num_proc": nothing(LOADER),
    "dataloader_num_workers": nothing(LOADER),
    "dataloader_prefetch_factor": nothing(LOADER),
    "dataloader_pin_memory": nothing(LOADER),
    "shuffle_merged_datasets": same(
        True, why="soup's too", otherwise="soup shuffles rows; training.curriculum orders them"
    ),
    "dataset_exact_deduplication": same(False, why="off", otherwise="soup keeps rows that repeat"),
    "val_set_size": held_out_share,
    "output_dir": leave(PLACE),
    "hub_model_id": leave(HUB),
    "hub_strategy": leave(HUB),
    "push_dataset_to_hub": leave("soup uploads no data"),
    "adapter": _adapter,
    "lora_model_dir": leave("soup starts new adapters; fold the old in first: soup runs export --merged"),
    "lora_r": _lora(to("lora.r", whole)),
    "lora_alpha": _lora(to("lora.alpha", float)),
    "lora_dropout": _lora(to("lora.dropout", float)),
    # axolotl adds these to what lora_target_linear finds, which is all that soup can name.
    "lora_target_modules": _lora(
        lambda value, file: (
            [Same("lora_target_linear has all of them")] if at(file, "lora_target_linear") else targets(value)
        )
    ),
    "lora_target_linear": _lora(lambda value, _: targets("all-linear") if flag(value) else [Same("off")]),
    "lora_modules_to_save": _lora(leave("soup trains adapters, and no whole modules beside them")),
    "lora_fan_in_fan_out": nothing("PEFT knows each layer's orientation"),
    "peft_use_dora": _lora(switch("lora.use_dora")),
    "peft_use_rslora": _lora(switch("lora.use_rslora")),
    "loraplus_lr_ratio": _lora(to("lora.loraplus_lr_ratio", float)),
    "lora_mlp_kernel": nothing(SPEED),
    "lora_qkv_kernel": nothing(SPEED),
    "lora_o_kernel": nothing(SPEED),
    "sequence_len": to("data.max_length", whole),
    "excess_length_strategy": each(
        {
            "drop": Put("data.on_too_long", "skip"),
            "truncate": Put("data.on_too_long", "truncate"),
            "raise": Put("data.on_too_long", "refuse"),
        },
        "soup truncates, skips or refuses",
    ),
    "sample_packing": switch("training.packing"),
    "eval_sample_packing": leave("soup packs held-out rows as it packs training rows"),
    "pad_to_sequence_len": same(False, why="off", otherwise="soup pads to the longest row of a batch"),
    "group_by_length": same(False, why="off", otherwise="training.curriculum=true orders rows by length"),
    "train_on_inputs": same(False, why="soup's too", otherwise="soup learns what the assistant says, and no prompts"),
    "micro_batch_size": to("training.batch_size", whole),
    "eval_batch_size": leave("soup evaluates with as many rows as it trains with"),
    "gradient_accumulation_steps": to("training.gradient_accumulation_steps", whole),
    "num_epochs": to("training.epochs", float),
    "max_steps": to("training.max_steps", whole),
    "optimizer": OPTIMIZER,
    "lr_scheduler": SCHEDULER,
    "learning_rate": to("optim.lr", float),
    "weight_decay": to("optim.weight_decay", float),
    "adam_beta1": to("optim.beta1", float),
    "adam_beta2": to("optim.beta2", float),
    "adam_epsilon": to("optim.eps", float),
    "max_grad_norm": to("training.max_grad_norm", float),
    "warmup_ratio": to("optim.warmup_ratio", float),
    "warmup_steps": warmup_steps("max_steps"),
    "bf16": _bf16,
    "fp16": _fp16,
    "tf32": nothing("how float32 is multiplied on a GPU"),
    "gradient_checkpointing": each(
        {value: Put("training.gradient_checkpointing", value) for value in (True, False)},
        "soup recomputes activations, and moves none to host memory: training.gradient_checkpointing=true",
    ),
    "gradient_checkpointing_kwargs": nothing(SPEED),
    "flash_attention": _flash,
    "attn_implementation": _flash,
    "attention": _flash,
    "sdp_attention": each({True: Put("training.use_flash_attn", "off"), False: Same("off")}, "unknown"),
    "xformers_attention": ATTENTION,
    "flex_attention": ATTENTION,
    "s2_attention": ATTENTION,
    "plugins": _plugins,
    **dict.fromkeys(LIGER_KEYS, _liger),
    "resume_from_checkpoint": leave(RESUME),
    "auto_resume_from_checkpoints": nothing(RESUME),
    "logging_steps": to("training.logging_steps", whole),
    "save_steps": counted("training.save_steps"),
    "eval_steps": counted("training.eval_steps"),
    "saves_per_epoch": _evenly("save"),
    "evals_per_epoch": _evenly("eval"),
    "save_strategy": same("steps", why="soup's too", otherwise="soup counts steps: training.save_steps"),
    "eval_strategy": same("steps", why="soup's too", otherwise="soup counts steps: training.eval_steps"),
    "save_total_limit": leave("soup keeps the last two checkpoints"),
    "save_safetensors": nothing("soup's too"),
    "early_stopping_patience": leave("soup trains to its end; training.loss_watchdog stops what diverges"),
    "loss_watchdog_threshold": lambda value, _: [
        Put("training.loss_watchdog", True), Put("training.loss_watchdog_threshold", float(value)),
    ],
    "loss_watchdog_patience": when(
        lambda file: at(file, "loss_watchdog_threshold"),
        to("training.loss_watchdog_patience", whole),
        "there is no loss_watchdog_threshold",
    ),
    "neftune_noise_alpha": to("training.neftune_alpha", float),
    "seed": to("training.seed", whole),
    "wandb_project": _tracked("wandb", "project"),
    "wandb_entity": _tracked("wandb", "entity"),
    "wandb_mode": _tracked("wandb", "mode"),
    "wandb_name": to("run.name"),
    "wandb_run_id": leave("a run's id is soup's, so that a resume goes on in the same run"),
    "wandb_watch": leave("soup sends what metrics.jsonl has, no gradients"),
    "wandb_log_model": leave("soup uploads no checkpoints to a tracker"),
    "mlflow_experiment_name": _tracked("mlflow", "experiment"),
    "mlflow_tracking_uri": _tracked("mlflow", "uri"),
    "mlflow_run_name": to("run.name"),
    "trackio_project_name": _tracked("trackio", "project"),
    "trackio_run_name": to("run.name"),
    "trackio_space_id": leave("soup's trackio keeps its database on this machine"),
    **dict.fromkeys(
        ("use_wandb", "use_mlflow", "use_trackio", "use_tensorboard"),
        nothing("tracking says which follow the run"),
    ),
    "deepspeed": deepspeed,
    "fsdp": _fsdp,
    "fsdp_config": _fsdp_config,
    "fsdp_version": nothing("soup shards with FSDP2"),
    "context_parallel_size": _ring,
    "sequence_parallel_degree": _ring,
    "ddp_timeout": to(TIMEOUT, whole),
    "special_tokens": leave(TOKENS),
    "tokens": leave(TOKENS),
    "unfrozen_parameters": leave("soup freezes whole layers from the bottom: training.freeze_layers"),
    "rl_beta": _of("dpo", "ipo", "kto", "orpo", "simpo", "grpo", entry=to("task.beta", float)),
    "orpo_alpha": _of("orpo", entry=to("task.beta", float)),
    "simpo_gamma": _of("simpo", entry=to("task.gamma", float)),
    "cpo_alpha": _of("simpo", entry=leave("SimPO (arXiv:2405.14734) has no likelihood term beside it")),
    "kto_desirable_weight": _of("kto", entry=to("task.desirable_weight", float)),
    "kto_undesirable_weight": _of("kto", entry=to("task.undesirable_weight", float)),
    "dpo_label_smoothing": _of("dpo", entry=to("task.label_smoothing", float)),
    "precompute_ref_log_probs": _of("dpo", "ipo", "kto", entry=switch("task.precompute_ref")),
    "center_rewards_coefficient": to("task.center_rewards_coefficient", float),
    "trl.beta": _of("grpo", entry=to("task.beta", float)),
    "trl.num_generations": _of("grpo", entry=to("task.num_generations", whole)),
    "trl.max_completion_length": _of("grpo", entry=to("task.max_completion_length", whole)),
    "trl.temperature": _of("grpo", entry=to("task.temperature", float)),
    "trl.reward_funcs": leave("soup's rewards are task.rewards: exact_match, numeric, regex:..., FILE.py:FUNCTION"),
    "trl.use_vllm": same(False, why="off", otherwise="soup generates with the model that trains"),
    "strict": nothing("soup refuses every key that nothing reads"),
}  # fmt: skip


def _defaults(file: File) -> dict[str, Any]:
    values: dict[str, Any] = {
        "sequence_len": 512,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1.0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.03,
        "gradient_checkpointing": False,
    }
    if at(file, "warmup_steps") is not None:
        del values["warmup_ratio"]
    # It cuts plain text into rows of that length, none of which is too long.
    if not at(file, "pretraining_dataset") and not any(
        one.get("type") in ("completion", "pretrain") for one in at(file, "datasets", [])
    ):
        values["excess_length_strategy"] = "drop"
    return values


def _finish(file: File) -> list[tuple[str, Outcome]]:
    found = _tracking(file)
    if not at(file, "adapter"):
        found.append(("adapter", Choose("lora", "none")))
    return found


AXOLOTL = Tool(
    name="axolotl",
    version="0.19",
    model="base_model",
    table=TABLE,
    defaults=_defaults,
    finish=_finish,
)
