"""Keys that people's files have and soup has no use for: the reason for each, which several tools' tables share."""

from __future__ import annotations

from soup.importers.mapping import LOADER, Entry, leave, nothing, same

KERNEL = "how it is computed, not what is learnt: soup has kernels of its own, and training.use_liger"
VLLM = "soup generates with the model that trains"
DECAY = "soup's schedules fall to zero: optim.scheduler=cosine, linear or constant"

# Arguments of transformers' and of TRL's.
TRAINERS: dict[str, Entry] = {
    "remove_unused_columns": nothing("soup reads the columns that a format needs"),
    "average_tokens_across_devices": same(
        True, why="soup's too", otherwise="soup weighs every token of a step alike, on all devices"
    ),
    "lr_scheduler_kwargs": leave(DECAY),
    "preprocessing_num_workers": leave(LOADER),
    "dataset_configs": leave("soup reads a data set's default configuration: write another to a file"),
    "chat_template": leave("soup takes a template from a file: model.chat_template=FILE"),
    "eos_token": leave("soup takes the tokenizer as it is: save one with this token beside the model"),
    "system_prompt": leave(
        "soup takes the rows as they are: write it into them, as a message of role system"
    ),
    "padding_free": leave("how rows lie in memory, not what is learnt: training.packing fills batches up"),
    "log_completions": leave("soup logs rewards and lengths, no answers: soup generate RUN --prompts FILE"),
    "use_liger": leave("TRL's older name of use_liger_kernel: training.use_liger=true"),
    "wandb_project": leave("with tracking=wandb, tracking.wandb.project"),
    "wandb_entity": leave("with tracking=wandb, tracking.wandb.entity"),
    **dict.fromkeys(
        (
            "vllm_device",
            "vllm_gpu_memory_utilization",
            "vllm_mode",
            "vllm_max_model_len",
            "vllm_server_host",
            "vllm_server_port",
        ),
        leave(VLLM),
    ),
}
AXOLOTL: dict[str, Entry] = {
    "remove_unused_columns": TRAINERS["remove_unused_columns"],
    "local_rank": nothing("the launcher says which process this is"),
    "debug": nothing("what is printed"),
    "eval_table_size": leave(
        "soup evaluates a loss, and generates when asked to: soup generate RUN --prompts FILE"
    ),
    "eval_max_new_tokens": leave("soup evaluates a loss; soup generate RUN --max-tokens N"),
    "chunked_cross_entropy": nothing(KERNEL),
    "tiled_mlp": nothing(KERNEL),
    "unsloth_cross_entropy_loss": nothing(KERNEL),
    "activation_offloading": leave(
        "soup keeps activations, or recomputes them: training.gradient_checkpointing"
    ),
    "min_sample_len": leave("soup leaves no row out for being short: filter the file"),
    "eot_tokens": leave("soup learns what the template's assistant turn ends with"),
    "num_labels": same(
        1, why="soup's reward model has one score", otherwise="soup's reward model has one score"
    ),
    "cosine_min_lr_ratio": leave(DECAY),
    "cosine_constant_lr_ratio": leave(DECAY),
    "save_only_model": same(False, why="off", otherwise="soup's checkpoints hold what a resume needs"),
    "save_first_step": leave("soup counts steps: training.save_steps"),
}
PIXELS = leave("soup trains on text")
LLAMA_FACTORY: dict[str, Entry] = {
    "image_max_pixels": PIXELS,
    "video_max_pixels": PIXELS,
    "freeze_trainable_modules": leave(
        "soup freezes whole layers: training.freeze_layers, training.freeze_ratio"
    ),
    "ray_run_name": leave("soup starts processes itself, or SLURM does: launch=slurm"),
    "ray_num_workers": leave("soup starts processes itself: distributed.processes=N"),
}
# Which soup-cli reads in no version, or under another name.
SOUP_CLI: dict[str, Entry] = {
    "lora": leave("soup-cli reads training.lora, and nothing of this: lora.r, lora.alpha and so on"),
    "data.eval": leave("soup-cli reads no such key, and soup would: data.eval=FILE"),
    "training.grad_accum": leave("soup-cli reads gradient_accumulation_steps, and nothing of this"),
    "training.warmup": leave("soup-cli reads warmup_ratio, and nothing of this: optim.warmup_ratio"),
    "training.stream_layers": same(
        False,
        why="off",
        otherwise="soup keeps the model on its device; distributed=fsdp_full_offload moves it",
    ),
}
