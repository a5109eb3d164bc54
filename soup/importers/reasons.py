"""Keys that people's files have and soup has no use for: the reason for each, which several tools' tables share."""

from __future__ import annotations

from soup.importers.mapping import LOADER, Entry, leave, nothing, same

KERNEL = "how it is computed, not what is learnt: soup has kernels of its own, and training.use_liger"
VLLM = "soup generates with the model that trains"
DECAY = "soup's schedules fall to zero: optim.scheduler=cosine, linear or constant"
PARALLEL = (
    "soup cuts states, or rows for a ring, and neither matrices nor experts: distributed=, longctx.ring_size"
)
LOSS = "another loss than soup's, the likelihood of answers"
FLOAT8 = "soup computes in bfloat16 or float32: model.dtype"
STORED = "soup stores weights plain, or in bitsandbytes' 4 or 8 bits: model.quantization"
GENERATES = "soup evaluates a loss, and generates when asked to: soup generate RUN --prompts FILE"
STARTS = "soup starts processes itself, or SLURM does: distributed.processes=N, launch=slurm"
BEST = "soup keeps what the end of training gave; checkpoints hold the last two"


def all_of(entry: Entry, keys: str) -> dict[str, Entry]:
    return dict.fromkeys(keys.split(), entry)


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
    **all_of(leave(BEST), "load_best_model_at_end metric_for_best_model greater_is_better"),
    **all_of(
        nothing(LOADER), "dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers"
    ),
    "ddp_find_unused_parameters": nothing("soup asks DDP for what the model needs"),
    "torch_compile": leave("soup compiles no models; its kernels are of their own"),
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
    **{
        key: TRAINERS[key] for key in ("remove_unused_columns", "ddp_find_unused_parameters", "torch_compile")
    },
    **all_of(
        nothing(KERNEL),
        """use_kernels use_scattermoe use_sonicmoe experts_implementation cut_cross_entropy
        flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp fused_attn_kernel flex_attn_compile_kwargs
        gemma4_hybrid_attn_impl use_glm_dsa_kernels use_dsv4_kernels dsv4_fp4_grouped_mode liger_rms_norm_gated""",
    ),
    **all_of(
        leave(PARALLEL),
        """tensor_parallel_size expert_parallel_size expert_parallel_num_nvl_bytes
        expert_parallel_token_capacity""",
    ),
    "dp_shard_size": leave("all processes share a state: distributed.processes=N"),
    "dp_replicate_size": leave("all processes share a state: distributed.processes=N"),
    **all_of(leave(LOSS), "use_eaft eaft_alpha eaft_k diffusion ebft process_reward_model"),
    **all_of(leave(FLOAT8), "fp8 fp8_enable_fsdp_float8_all_gather"),
    **all_of(
        leave(STORED),
        """gptq gptq_groupsize gptq_model_v1 gptq_disable_exllama bnb_config_kwargs nvfp4_merge_aware
        quantize_moe_experts model_quantization_config model_quantization_config_kwargs llmcompressor""",
    ),
    **all_of(
        leave("soup has no such optimizer or schedule of its own: optim=, optim.scheduler="),
        """relora
        relora_prune_ratio relora_cpu_offload jagged_restart_steps jagged_restart_warmup_steps
        jagged_restart_anneal_steps lisa_n_layers lisa_step_interval lisa_layers_attribute lr_quadratic_warmup
        optim_args""",
    ),
    **all_of(
        leave("soup follows runs with wandb, mlflow, tensorboard and trackio: tracking="),
        """use_swanlab
        swanlab_project swanlab_experiment_name swanlab_description swanlab_mode swanlab_workspace
        swanlab_log_completions swanlab_completion_log_interval swanlab_completion_max_buffer swanlab_log_model
        use_otel_metrics otel_metrics_host otel_metrics_port""",
    ),
    **all_of(leave(STARTS), "use_ray ray_num_workers ddp accelerator_config device_map"),
    **all_of(leave(GENERATES), "eval_causal_lm_metrics do_causal_lm_eval"),
    **all_of(
        leave("soup packs by best fit"),
        """sample_packing_eff_est sample_packing_seq_len_multiplier
        sample_packing_sequentially total_num_tokens pretrain_multipack_attn streaming_multipack_buffer_size""",
    ),
    **all_of(leave(VLLM), "vllm trl.vllm_server_host trl.vllm_server_port trl.vllm_server_timeout"),
    **all_of(
        leave("soup's GRPO has beta, temperature, rewards and their weights: task=grpo"),
        """trl.loss_type trl.epsilon
        trl.scale_rewards trl.top_p trl.generation_kwargs trl.async_prefetch trl.multi_objective_aggregation""",
    ),
    "trl.reward_weights": leave("with task.rewards, task.reward_weights weighs them"),
    "trl.log_completions": TRAINERS["log_completions"],
    "trl.num_completions_to_print": TRAINERS["log_completions"],
    **all_of(
        leave("soup takes the tokenizer as it is"),
        """tokenizer_legacy tokenizer_use_fast
        tokenizer_use_mistral_common resize_token_embeddings_to_32x""",
    ),
    **all_of(
        leave("soup fills the template with messages, and nothing else"),
        "chat_template_kwargs trl.chat_template_kwargs",
    ),
    "freeze_mm_modules": leave("soup trains on text"),
    "skip_prepare_dataset": leave("soup tokenises before training, or while it trains: data.streaming=true"),
    "streaming": leave("data.streaming=true, with the rows in datasets"),
    "curriculum_sampling": leave("training.curriculum=true orders rows by length"),
    "reinit_weights": leave("soup starts from the model's weights"),
    "peft": leave("soup starts adapters as LoRA does, at zero, on the weights as they are stored"),
    "torchdistx_path": leave("soup has no optimizer of torchdistx's"),
    "lora_target_parameters": leave("training.moe_lora=true gives experts adapters, all of them"),
    **all_of(leave("axolotl's deprecated, which it reads no more"), "max_packed_sequence_len"),
    "batch_size": leave(
        "training.batch_size is of each device: batch_size / gradient_accumulation_steps / processes"
    ),
    "hf_use_auth_token": nothing("the hub client has an authentication of its own: hf auth login"),
    **all_of(
        nothing("how the model is loaded"),
        """low_cpu_mem_usage experimental_skip_move_to_device ple_cpu_offload
        llama4_linearized_experts""",
    ),
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
TEXT = leave("soup trains on text")
LLAMA_FACTORY: dict[str, Entry] = {
    **all_of(
        TEXT,
        """image_max_pixels video_max_pixels freeze_vision_tower freeze_multi_modal_projector
        freeze_language_model""",
    ),
    **all_of(leave(LOSS), "use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_alpha"),
    **all_of(leave(FLOAT8), "fp8 fp8_backend fp8_enable_fsdp_float8_all_gather"),
    **all_of(leave("soup has LoRA, and all weights"), "oft_target oft_block_size oft_rank"),
    **all_of(leave("soup starts adapters as LoRA does, at zero"), "pissa_iter pissa_convert"),
    **all_of(
        leave("soup has no Apollo; optim=galore projects too"),
        """apollo_target apollo_rank apollo_update_interval
        apollo_scale apollo_layerwise apollo_scale_type""",
    ),
    **all_of(leave("soup has no BAdam"), "badam_mode badam_switch_interval badam_switch_mode badam_verbose"),
    **all_of(
        leave("soup takes the tokenizer as it is: save one with these tokens beside the model"),
        """add_tokens
        add_special_tokens new_special_tokens_config resize_vocab init_special_tokens""",
    ),
    **all_of(
        leave("soup's models are transformers' own"), "mixture_of_depths use_kt kt_weight_path kt_num_threads"
    ),
    "predict_with_generate": leave(GENERATES),
    "use_v1_kernels": nothing(KERNEL),
    "fsdp_transformer_layer_cls_to_wrap": nothing("soup wraps the decoder's layers"),
    "freeze_trainable_modules": leave(
        "soup freezes whole layers: training.freeze_layers, training.freeze_ratio"
    ),
    "ray_run_name": leave("soup starts processes itself, or SLURM does: launch=slurm"),
    "ray_num_workers": leave("soup starts processes itself: distributed.processes=N"),
}
# Which soup-cli reads in no version, or under another name.
SOUP_CLI: dict[str, Entry] = {
    **all_of(leave("soup trains on text"), "data.audio_dir data.image_dir"),
    **all_of(
        leave("soup has no such task"),
        """training.bco_beta training.embedding_loss training.embedding_margin
        training.embedding_pooling training.num_labels training.label_names training.classifier_kind""",
    ),
    **all_of(leave("soup keeps the model on its device"), "training.stream_source training.stream_buffers"),
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
