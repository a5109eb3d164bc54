"""TRL's YAML, as `trl sft --config FILE` reads it (ScriptArguments, ModelConfig, and the trainers' configurations)."""

from __future__ import annotations

from typing import Any

from soup.importers import reasons
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
    fsdp,
    leave,
    nothing,
    same,
    sources,
    switch,
    targets,
    to,
    trackers,
    warmup_steps,
    when,
    whole,
)

TASK = "task"  # which trainer is on TRL's command line; `soup import --task` puts it here
TASKS = {name: name for name in ("sft", "dpo", "kto", "orpo", "grpo", "reward")}
RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "orpo": 1e-6, "grpo": 1e-6, "reward": 1e-4}
PART = "soup reads a source as it is, its split train: write the part that is meant to a file"
MIXED = "16-bit mixed precision; model.dtype=auto computes in bfloat16 where the hardware has it"
EVALUATES = "soup evaluates where there are held-out rows"
EPOCHS = "soup counts steps, and how many an epoch has is not in this file: training."

EVALUATION = each(
    {"steps": Same("soup counts steps"), "no": Same(EVALUATES), False: Same(EVALUATES)}, f"{EPOCHS}eval_steps"
)

# Arguments of transformers' that LLaMA-Factory's files have too.
ARGUMENTS: dict[str, Entry] = reasons.TRAINERS | {
    "output_dir": leave(PLACE),
    "overwrite_output_dir": leave(RESUME),
    "resume_from_checkpoint": leave(RESUME),
    "run_name": to("run.name"),
    "do_train": nothing("soup trains"),
    "do_eval": nothing(EVALUATES),
    "do_predict": same(
        False, why="soup trains", otherwise="soup generate RUN --prompts FILE, after training"
    ),
    "learning_rate": to("optim.lr", float),
    "num_train_epochs": to("training.epochs", float),
    "max_steps": lambda value, _: (
        [Put("training.max_steps", whole(value))] if whole(value) > 0 else [Same("epochs count")]
    ),
    "per_device_train_batch_size": to("training.batch_size", whole),
    "per_device_eval_batch_size": leave("soup evaluates with as many rows as it trains with"),
    "gradient_accumulation_steps": to("training.gradient_accumulation_steps", whole),
    "gradient_checkpointing": switch("training.gradient_checkpointing"),
    "gradient_checkpointing_kwargs": nothing("makes no difference to what is learnt"),
    "max_grad_norm": to("training.max_grad_norm", float),
    "weight_decay": to("optim.weight_decay", float),
    "adam_beta1": to("optim.beta1", float),
    "adam_beta2": to("optim.beta2", float),
    "adam_epsilon": to("optim.eps", float),
    "lr_scheduler_type": SCHEDULER,
    "warmup_ratio": to("optim.warmup_ratio", float),
    "warmup_steps": warmup_steps("max_steps"),
    "optim": OPTIMIZER,
    "logging_steps": to("training.logging_steps", whole),
    "logging_strategy": same("steps", why="soup counts steps", otherwise=f"{EPOCHS}logging_steps"),
    "logging_first_step": same(
        False, why="off", otherwise="training.logging_steps=1 logs the first step too"
    ),
    "log_level": nothing("what is printed"),
    "save_steps": counted("training.save_steps"),
    "save_strategy": each(
        {"steps": Same("soup counts steps"), "epoch": Leave(f"{EPOCHS}save_steps")},
        "soup saves what a resume needs, every training.save_steps steps, and the model at its end",
    ),
    "save_total_limit": leave("soup keeps the last two checkpoints"),
    "save_only_model": same(False, why="off", otherwise="soup's checkpoints hold what a resume needs"),
    "eval_steps": counted("training.eval_steps"),
    "eval_strategy": EVALUATION,
    "evaluation_strategy": EVALUATION,
    "seed": to("training.seed", whole),
    "data_seed": to("training.data_seed", whole),
    "bf16": lambda value, file: (
        [Same(MIXED)]
        if flag(value)
        else [Same("fp16 instead")]
        if at(file, "fp16")
        else [Put("model.dtype", "float32")]
    ),
    "fp16": each({True: [Put("model.dtype", "float16")], False: [Same("off")]}, "is neither true nor false"),
    "tf32": nothing("how float32 is multiplied on a GPU"),
    "report_to": trackers,
    "push_to_hub": same(False, why="off", otherwise=HUB),
    "hub_model_id": leave(HUB),
    "hub_strategy": leave(HUB),
    "hub_model_revision": leave(HUB),
    "dataloader_num_workers": leave(LOADER),
    "ddp_timeout": to(TIMEOUT, whole),
    "deepspeed": deepspeed,
    "fsdp": fsdp,
    "neftune_noise_alpha": to("training.neftune_alpha", float),
    "use_liger_kernel": switch("training.use_liger"),
    "trust_remote_code": switch("model.trust_remote_code"),
}


def _peft(entry: Entry) -> Entry:
    return when(lambda file: at(file, "use_peft", False), entry, "use_peft is off: all weights train")


def _of(*tasks: str, entry: Entry) -> Entry:
    return when(lambda file: at(file, TASK) in tasks, entry, f"read by {' and '.join(tasks)} only")


def _modules(value: Any, _: File) -> list[Outcome]:
    if value == ["all-linear"]:
        return targets("all-linear")
    return targets(value)


def _datasets(value: Any, _: File) -> list[Outcome]:
    """A mixture: paths, and what else each says."""
    found: list[Outcome] = [sources([str(one["path"]) for one in value])]
    beside = sorted({key for one in value for key in one if key not in ("path", "data_files")})
    files = [one["data_files"] for one in value if one.get("data_files")]
    if beside:
        found.append(Leave(f"{PART} ({', '.join(beside)})"))
    if files:
        found.append(Leave("data.train takes files themselves, not a hub repository's"))
    return found


def _mixture(value: Any, _: File) -> list[Outcome]:
    """The alignment-handbook's `dataset_mixture`: ids, each with a configuration, a split, columns and a weight."""
    ids = list(dict.fromkeys(str(one["id"]) for one in value["datasets"]))
    beside = sorted(
        {key for one in value["datasets"] for key in one if key != "id"} | (set(value) - {"datasets"})
    )
    found: list[Outcome] = [sources(ids)]
    if beside:
        found.append(Leave(f"{PART} ({', '.join(beside)})"))
    return found


def _mixer(value: Any, _: File) -> list[Outcome]:
    """The alignment-handbook's `dataset_mixer`: names, and the part of each that is taken."""
    found: list[Outcome] = [sources([str(name) for name in value])]
    if any(float(part) != 1 for part in value.values()):
        found.append(Leave("takes a part of a source; data.weights are shares of an epoch"))
    return found


def _loss(value: Any, file: File) -> list[Outcome]:
    names = value if isinstance(value, list) else [value]
    task = at(file, TASK)
    if task == "dpo" and names == ["ipo"]:
        return [Choose("task", "ipo")]
    if (task, names[0]) in (("dpo", "sigmoid"), ("kto", "kto"), ("sft", "nll")) and len(names) == 1:
        return [Same("soup's loss for this task")]
    if task == "grpo":
        return [Put("task.loss_type", names[0])]
    return [Leave("soup has no such loss: task=dpo, ipo, simpo, orpo, kto")]


def _bits(name: str) -> Entry:
    return lambda value, _: [Put("model.quantization", name)] if flag(value) else [Same("off")]


TABLE: dict[str, Entry] = ARGUMENTS | {
    TASK: each({key: Choose("task", name) for key, name in TASKS.items()}, "soup has no such task"),
    "model_name_or_path": lambda value, _: [Choose("model", "hub"), Put("model.base", str(value))],
    "model_revision": to("model.revision"),
    "dtype": lambda value, _: [Put("model.dtype", str(value))],
    "torch_dtype": lambda value, _: [Put("model.dtype", str(value))],
    "attn_implementation": each(
        {
            "flash_attention_2": Put("training.use_flash_attn", "v2"),
            "flash_attention_3": Put("training.use_flash_attn", "v3"),
            "sdpa": Put("training.use_flash_attn", "off"),
        },
        "soup has FlashAttention 2 and 3, and torch's own attention",
    ),
    "use_peft": each({True: Choose("lora", "lora"), False: Choose("lora", "none")}, "is neither true nor false"),
    "lora_r": _peft(to("lora.r", whole)),
    "lora_alpha": _peft(to("lora.alpha", float)),
    "lora_dropout": _peft(to("lora.dropout", float)),
    "lora_target_modules": _peft(_modules),
    "lora_task_type": nothing("the task says it"),
    "use_rslora": _peft(switch("lora.use_rslora")),
    "use_dora": _peft(switch("lora.use_dora")),
    "load_in_4bit": _bits("4bit"),
    "load_in_8bit": _bits("8bit"),
    "bnb_4bit_quant_type": same("nf4", why="soup's 4 bits are NF4", otherwise="soup's 4 bits are NF4"),
    "use_bnb_nested_quant": same(
        True, why="soup quantizes 4-bit scales too", otherwise="soup quantizes 4-bit scales too"
    ),
    "dataset_name": to("data.train"),
    "dataset_config": leave("soup reads a data set's default configuration: write another to a file"),
    "dataset_train_split": same("train", why="soup's too", otherwise=PART),
    "dataset_test_split": leave("held-out rows: data.eval=FILE, or data.eval_fraction"),
    "dataset_streaming": switch("data.streaming"),
    "datasets": _datasets,
    "dataset_mixture": _mixture,
    "dataset_mixer": _mixer,
    "dataset_splits": leave(PART),
    "dataset_num_proc": to("data.num_proc", whole),
    "dataset_text_field": same("text", why="soup's too", otherwise="soup reads plain text from the column text"),
    "chat_template_path": to("model.chat_template"),
    "max_length": to("data.max_length", whole),
    "max_seq_length": to("data.max_length", whole),
    "max_prompt_length": leave("soup has one limit, of prompt and answer together: data.max_length"),
    "packing": switch("training.packing"),
    "packing_strategy": same("bfd", why="soup packs by best fit", otherwise="soup packs by best fit"),
    "eval_packing": leave("soup packs held-out rows as it packs training rows"),
    "assistant_only_loss": same(True, why="soup's loss", otherwise="soup learns answers, and no prompts"),
    "completion_only_loss": same(True, why="soup's loss", otherwise="soup learns answers, and no prompts"),
    "beta": _of("dpo", "kto", "orpo", "grpo", entry=to("task.beta", float)),
    "loss_type": _loss,
    "label_smoothing": _of("dpo", entry=to("task.label_smoothing", float)),
    "precompute_ref_log_probs": _of("dpo", "kto", entry=switch("task.precompute_ref")),
    "desirable_weight": _of("kto", entry=to("task.desirable_weight", float)),
    "undesirable_weight": _of("kto", entry=to("task.undesirable_weight", float)),
    "center_rewards_coefficient": _of("reward", entry=to("task.center_rewards_coefficient", float)),
    "num_generations": _of("grpo", entry=to("task.num_generations", whole)),
    "max_completion_length": _of("grpo", entry=to("task.max_completion_length", whole)),
    "temperature": _of("grpo", entry=to("task.temperature", float)),
    "reward_funcs": leave("soup's rewards are task.rewards: exact_match, numeric, regex:..., FILE.py:FUNCTION"),
    "reward_weights": leave("with task.rewards, task.reward_weights weighs them"),
    "use_vllm": same(False, why="off", otherwise="soup generates with the model that trains"),
    "router_aux_loss_coef": to("training.moe_aux_loss_coeff", float),
}  # fmt: skip


def defaults(file: File) -> dict[str, Any]:
    task = str(at(file, TASK))
    values: dict[str, Any] = {
        "learning_rate": RATES[task],
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "lr_scheduler_type": "linear",
        "logging_steps": 10,
        "save_steps": 500,
        "use_peft": False,
    }
    if at(file, "warmup_steps") is None:
        values["warmup_ratio"] = 0.0
    if task != "grpo" and at(file, "max_seq_length") is None:
        values["max_length"] = 1024
    if at(file, "use_peft", False):
        values |= {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
    if task in ("dpo", "kto", "orpo"):
        values["beta"] = 0.1
    if task == "grpo":
        values |= {"beta": 0.0, "num_generations": 8, "max_completion_length": 512, "temperature": 1.0}
        values["loss_type"] = "dapo"
    return values


def _finish(file: File) -> list[tuple[str, Outcome]]:
    if at(file, "use_peft", False) and at(file, "lora_target_modules") is None:
        why = "PEFT's own choice for the model; soup takes all linear layers, or lora.target_modules=[...]"
        return [("lora_target_modules", Leave(why))]
    return []


TRL = Tool(
    name="TRL",
    version="1.12",
    model="model_name_or_path",
    signs=frozenset(
        {"use_peft", "dataset_name", "datasets", "dataset_mixture", "dataset_mixer", "lora_r", "load_in_4bit"}
    ),
    table=TABLE,
    defaults=defaults,
    finish=_finish,
    needs_task=True,
)
