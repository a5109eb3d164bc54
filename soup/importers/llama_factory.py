"""LLaMA-Factory's YAML, as its 0.9.5 reads it (llamafactory.hparams)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from soup.importers import reasons
from soup.importers.mapping import (
    LOADER,
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
    sources,
    switch,
    targets,
    to,
    when,
    whole,
)
from soup.importers.trl import ARGUMENTS

STAGES = {"sft": "sft", "pt": "pretrain", "rm": "reward", "kto": "kto", "ppo": "ppo", "dpo": "dpo"}
LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}


def _stage(file: File) -> str:
    return str(at(file, "stage", "sft"))


def _task(file: File) -> str | None:
    stage = _stage(file)
    return LOSSES.get(str(at(file, "pref_loss", "sigmoid"))) if stage == "dpo" else STAGES.get(stage)


def _staged(_: Any, file: File) -> list[Outcome]:
    task = _task(file)
    why = "soup has no such task or preference loss, and trains sft as this stands"
    return [Leave(why) if task is None else Choose("task", task)]


def _of(*tasks: str, entry: Entry) -> Entry:
    return when(lambda file: _task(file) in tasks, entry, f"read by {' and '.join(tasks)} only")


def _on(name: str) -> Any:
    return lambda file: at(file, name, False)


def _lora(entry: Entry) -> Entry:
    return when(lambda file: _tunes(file) == "lora", entry, "there are no adapters")


def _tunes(file: File) -> str:
    return str(at(file, "finetuning_type", "lora"))


def _datasets(value: Any, file: File) -> list[Outcome]:
    """Names in dataset_info.json: what it says of each, where it is here."""
    names = (
        [one.strip() for one in value.split(",")] if isinstance(value, str) else [str(one) for one in value]
    )
    folder = Path(str(at(file, "dataset_dir", "data")))
    index = folder / "dataset_info.json"
    known = json.loads(index.read_text()) if index.is_file() else {}
    paths, unknown, special = [], [], []
    for name in names:
        about = known.get(name, {})
        if "file_name" in about:
            paths.append(str(folder / about["file_name"]))
        elif "hf_hub_url" in about:
            paths.append(about["hf_hub_url"])
        else:
            paths.append(str(folder / name))
            unknown.append(name)
        if about.get("columns") or about.get("tags") or about.get("subset") or about.get("split"):
            special.append(name)
    found: list[Outcome] = [sources(paths)]
    if unknown:
        names_ = ", ".join(unknown)
        found.append(
            Leave(f"{names_}: no such name in {index}, so where its rows are is not known: data.train=FILE")
        )
    elif special:
        names_ = ", ".join(special)
        found.append(Leave(f"{names_}: {index} renames columns or takes a part; soup reads the usual names"))
    return found


def _quantization(value: Any, _: File) -> list[Outcome]:
    bits = whole(value)
    return [Put("model.quantization", f"{bits}bit")] if bits in (4, 8) else [Leave("soup has 4 and 8 bits")]


def _rope(value: Any, _: File) -> list[Outcome]:
    if value in ("linear", "dynamic", "yarn", "llama3"):
        return [Choose("longctx", value)]
    return [Leave("soup has no such scaling")]


def _tuning(value: Any, file: File) -> list[Outcome]:
    if value == "lora":
        return [Choose("lora", "lora")]
    if value == "full":
        return [Choose("lora", "none")]
    if value == "freeze":
        kept = at(file, "freeze_trainable_layers", 2)
        why = f"soup freezes layers from the bottom: training.freeze_layers=(layers of the model - {kept})"
        return [Choose("lora", "none"), Leave(why)]
    return [Leave("soup has LoRA, which it trains as this stands, and all weights")]


def _frozen(*_: Any) -> list[Outcome]:
    return [Leave("counts from the top, and the model's number of layers is not in this file")]


def _flash(value: Any, _: File) -> list[Outcome]:
    known = {"auto": "auto", "fa2": "v2", "fa3": "v3", "sdpa": "off"}
    return (
        [Put("training.use_flash_attn", known[value])]
        if value in known
        else [Leave("soup has v2, v3 and torch's own")]
    )


def _optimizer(name: str, choice: str) -> Entry:
    return lambda value, _: [Choose("optim", choice)] if flag(value) else [Same(f"{name} is off")]


def _mixture(value: Any, _: File) -> list[Outcome]:
    if value == "concat":
        return [Same("all rows of all sources")]
    return [Leave("soup mixes by data.weights, each source's share of an epoch")]


def _probabilities(value: Any, _: File) -> list[Outcome]:
    shares = [float(one) for one in (value.split(",") if isinstance(value, str) else value)]
    return [Put("data.weights", shares)]


TEMPLATE = "soup renders with the tokenizer's own chat template, or model.chat_template"
SPEED = "how it is computed, not what is learnt"
TABLE: dict[str, Entry] = ARGUMENTS | {
    **reasons.LLAMA_FACTORY,
    "model_name_or_path": lambda value, _: [Choose("model", "hub"), Put("model.base", str(value))],
    "adapter_name_or_path": leave(
        "soup starts new adapters; fold the old in first: soup runs export --merged"
    ),
    "stage": _staged,
    "finetuning_type": _tuning,
    "freeze_trainable_layers": _frozen,
    "lora_rank": _lora(to("lora.r", whole)),
    "lora_alpha": _lora(to("lora.alpha", float)),
    "lora_dropout": _lora(to("lora.dropout", float)),
    "lora_target": _lora(lambda value, _: targets(value, ("all",))),
    "use_dora": _lora(switch("lora.use_dora")),
    "use_rslora": _lora(switch("lora.use_rslora")),
    "loraplus_lr_ratio": _lora(to("lora.loraplus_lr_ratio", float)),
    "pissa_init": same(False, why="off", otherwise="soup starts adapters as LoRA does, at zero"),
    "additional_target": leave("soup trains adapters, and no whole modules beside them"),
    "quantization_bit": _quantization,
    "quantization_method": each(
        {name: Same("soup's too") for name in ("bnb", "bitsandbytes")}, "soup quantizes with bitsandbytes"
    ),
    "quantization_type": same("nf4", why="soup's too", otherwise="soup's 4 bits are NF4"),
    "double_quantization": same(True, why="soup's too", otherwise="soup quantizes 4-bit scales too"),
    "use_galore": lambda value, _: (
        [Choose("optim", "galore")] if flag(value) else [Same("use_galore is off")]
    ),
    "galore_rank": when(_on("use_galore"), to("optim.galore_rank", whole), "use_galore is off"),
    "galore_update_interval": when(
        _on("use_galore"), to("optim.galore_update_proj_gap", whole), "use_galore is off"
    ),
    "galore_scale": when(_on("use_galore"), to("optim.galore_scale", float), "use_galore is off"),
    "galore_layerwise": when(
        _on("use_galore"),
        same(False, why="soup's too", otherwise="soup updates all layers at once"),
        "use_galore is off",
    ),
    "galore_target": when(
        _on("use_galore"),
        each({"all": Same("all linear layers")}, "soup projects all linear layers inside the decoder"),
        "use_galore is off",
    ),
    "use_muon": _optimizer("use_muon", "muon"),
    "use_badam": same(False, why="off", otherwise="soup has no BAdam"),
    "use_apollo": same(False, why="off", otherwise="soup has no Apollo; optim=galore projects too"),
    "use_adam_mini": same(
        False, why="off", otherwise="soup has no Adam-mini; optim=adamw_8bit saves memory too"
    ),
    "use_llama_pro": same(False, why="off", otherwise="soup adds no layers"),
    "use_unsloth": each(
        {True: Choose("backend", "unsloth"), False: Same("off")}, "is neither true nor false"
    ),
    "use_unsloth_gc": nothing(SPEED),
    "enable_liger_kernel": switch("training.use_liger"),
    "flash_attn": _flash,
    "rope_scaling": _rope,
    "shift_attn": same(False, why="off", otherwise="soup has no shifted sparse attention"),
    "moe_aux_loss_coef": to("training.moe_aux_loss_coeff", float),
    "disable_gradient_checkpointing": lambda value, _: [
        Put("training.gradient_checkpointing", not flag(value))
    ],
    "pure_bf16": lambda value, _: [Put("model.dtype", "bfloat16")] if flag(value) else [Same("off")],
    "upcast_layernorm": same(False, why="off", otherwise="soup keeps norms in the model's precision"),
    "dataset": _datasets,
    "dataset_dir": nothing("where dataset names are looked up"),
    "eval_dataset": leave("data.eval=FILE; it is a name in dataset_info.json"),
    "template": leave(TEMPLATE),
    "default_system": leave(TEMPLATE),
    "enable_thinking": leave(TEMPLATE),
    "cutoff_len": to("data.max_length", whole),
    "max_samples": to("data.max_samples", whole),
    "val_size": lambda value, _: (
        [Put("data.eval_fraction", float(value))]
        if float(value) < 1
        else [Leave("soup holds out a share, not a number of rows: data.eval_fraction")]
    ),
    "train_on_prompt": same(
        False, why="soup's too", otherwise="soup learns what the assistant says, and no prompts"
    ),
    "mask_history": same(False, why="soup's too", otherwise="soup learns every answer of a conversation"),
    "streaming": switch("data.streaming"),
    "buffer_size": leave("soup draws from a buffer of 1000 rows"),
    "mix_strategy": _mixture,
    "interleave_probs": _probabilities,
    "packing": switch("training.packing"),
    "neat_packing": lambda value, _: (
        [Put("training.packing", True)] if flag(value) else [Same("off")]
    ),  # soup's packed documents do not see each other
    "overwrite_cache": nothing("soup's cache is by content"),
    "preprocessing_num_workers": nothing(LOADER),
    "preprocessing_batch_size": nothing(LOADER),
    "tokenized_path": leave("soup keeps tokens in its cache, by content"),
    "plot_loss": leave("`soup runs show`, metrics.jsonl, or tracking=tensorboard"),
    "include_num_input_tokens_seen": nothing("metrics.jsonl has tokens"),
    "pref_beta": _of("dpo", "ipo", "orpo", "simpo", "kto", entry=to("task.beta", float)),
    "pref_loss": when(
        lambda file: _stage(file) == "dpo",
        lambda value, _: (
            [Same("the task")] if value in LOSSES else [Leave("soup has dpo, ipo, orpo and simpo")]
        ),
        "read by stage dpo only",
    ),
    "pref_ftx": same(0, 0.0, why="off", otherwise="soup adds no likelihood term to a preference loss"),
    "dpo_label_smoothing": _of("dpo", entry=to("task.label_smoothing", float)),
    "simpo_gamma": _of("simpo", entry=to("task.gamma", float)),
    "kto_chosen_weight": _of("kto", entry=to("task.desirable_weight", float)),
    "kto_rejected_weight": _of("kto", entry=to("task.undesirable_weight", float)),
    "reward_model": _of("ppo", entry=to("task.reward_model")),
    "max_new_tokens": _of("ppo", entry=to("task.response_length", whole)),
    "temperature": _of("ppo", entry=to("task.temperature", float)),
    "top_p": _of("ppo", entry=leave("soup samples from all tokens, as the loss has it")),
    "top_k": _of("ppo", entry=leave("soup samples from all tokens, as the loss has it")),
    "ppo_epochs": _of("ppo", entry=to("task.num_ppo_epochs", whole)),
    "ref_model": leave("the reference is the model that training starts from"),
}


def _defaults(file: File) -> dict[str, Any]:
    values: dict[str, Any] = {
        "stage": "sft",
        "finetuning_type": "lora",
        "learning_rate": 5e-5,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "lr_scheduler_type": "linear",
        "logging_steps": 500,
        "save_steps": 500,
        "cutoff_len": 2048,
        "disable_gradient_checkpointing": False,
    }
    if at(file, "warmup_steps") is None:
        values["warmup_ratio"] = 0.0
    if _tunes(file) == "lora":
        rank = whole(at(file, "lora_rank", 8))
        values |= {"lora_rank": 8, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "lora_target": "all"}
    if _task(file) == "pretrain":
        values["packing"] = True
    if at(file, "use_galore", False):
        values |= {"galore_rank": 16, "galore_update_interval": 200, "galore_scale": 2.0}
    if _task(file) in ("dpo", "ipo", "orpo", "simpo", "kto"):
        values["pref_beta"] = 0.1
    if _task(file) == "ppo":
        values |= {"max_new_tokens": 1024, "temperature": 0.95}
    if _task(file) == "simpo":
        values["simpo_gamma"] = 0.5
    return values


LLAMA_FACTORY = Tool(
    name="LLaMA-Factory",
    version="0.9.5",
    model="model_name_or_path",
    signs=frozenset(
        {
            "stage",
            "finetuning_type",
            "cutoff_len",
            "lora_rank",
            "template",
            "quantization_bit",
            "pref_loss",
            "lora_target",
        }
    ),
    table=TABLE,
    defaults=_defaults,
)
