"""Every rule. A key is a configuration key; a bare group name stands for the chosen function (`lora: none`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from soup.rules.rule import Above, Not, OneOf, Rule, word

FSDP = OneOf("fsdp_full_shard", "fsdp_shard_grad", "fsdp_full_offload")
ZERO = OneOf("zero2", "zero3", "zero2_offload")
SHARDED = OneOf(*ZERO.values, *FSDP.values)
GALORE = "arXiv:2403.03507"
MUON = "arXiv:2502.16982"
RING = "longctx.use_ring_attention"
UNSLOTH_CPU = "unsloth_zoo.cpu"


def _pending(key: str, condition: Any, beside: Mapping[str, Any] | None = None) -> Rule:
    return Rule(
        key=key,
        when={key: condition} | dict(beside or {}),
        why="is not available yet"
        + "".join(f" with {name}={word(value)}" for name, value in (beside or {}).items()),
        fix="another choice; `soup plan` works with this one",
        pending=True,
    )


def _idle(switch: str, off: Any, key: str, default: Any) -> Rule:
    """A key that only a switched-off feature reads must keep its default (a test compares it with the YAML)."""
    return Rule(
        key=key,
        when={switch: off, key: Not(default)},
        why=f"nothing reads it while {switch}={word(off)}",
        fix=f"{switch}=true, or {key}={word(default)}",
    )


RULES: tuple[Rule, ...] = (
    # GaLore
    Rule(
        key="lora",
        when={"optim": "galore", "lora": Not("none")},
        why="GaLore projects the gradients of full weight matrices, which an adapter freezes",
        fix="lora=none, or optim=adamw",
        source=GALORE,
    ),
    Rule(
        key="model.quantization",
        when={"optim": "galore", "model.quantization": Not("none"), "model.quantization_aware": False},
        why="GaLore trains the weights themselves, and quantized weights take no gradient",
        fix="model.quantization=none, or optim=adamw lora=lora",
        source=GALORE,
    ),
    Rule(
        key="backend",
        when={"optim": "galore", "backend": "unsloth"},
        why="Unsloth builds its own optimizer groups, which lose GaLore's projections",
        fix="backend=transformers, or optim=adamw",
    ),
    Rule(
        key="distributed",
        when={"optim": "galore", "distributed": SHARDED},
        why="GaLore needs each gradient matrix whole on one device, and sharding cuts it",
        fix="distributed=ddp, or optim=adamw",
        source=GALORE,
    ),
    Rule(
        key="optim",
        when={"optim": "galore", "task": "ppo"},
        why="PPO trains a value model beside the policy in one optimizer, and GaLore projects one model's layers",
        fix="optim=adamw",
    ),
    Rule(
        key="optim",
        when={"optim": "galore", "model.moe": True},
        why="GaLore projects matrices, and this model's experts are fused in one parameter of three dimensions",
        fix="optim=adamw, or a dense model",
        source=GALORE,
    ),
    Rule(
        key="optim",
        when={"optim": "schedule_free", "task": "ppo"},
        why="the optimizer must be told when training pauses, and TRL's PPO loop does not tell it",
        fix="optim=adamw",
        source="arXiv:2405.15682",
    ),
    # Muon
    Rule(
        key="lora.loraplus_lr_ratio",
        when={"optim": "muon", "lora.loraplus_lr_ratio": Above(0)},
        why="Muon makes the updates of A and B the same size, whatever their gradients; LoRA+'s ratio is for Adam's",
        fix="lora=lora, or optim=adamw",
        source=MUON,
    ),
    Rule(
        key="optim",
        when={"optim": "muon", "task": "ppo"},
        why="PPO trains a value model beside the policy in one optimizer, and Muon is given one model's layers",
        fix="optim=adamw",
    ),
    Rule(
        key="optim",
        when={"optim": "muon", "model.moe": True},
        why="Muon orthogonalises matrices, and this model's experts are fused in one parameter of three dimensions",
        fix="optim=adamw, or a dense model",
        source=MUON,
    ),
    Rule(
        key="distributed",
        when={"optim": "muon", "distributed": SHARDED},
        why="Muon orthogonalises each matrix whole, and sharding cuts it",
        fix="distributed=ddp, or optim=adamw",
        source=MUON,
    ),
    # Quantization
    Rule(
        key="lora",
        when={"lora": "none", "model.quantization": Not("none"), "model.quantization_aware": False},
        why="quantized weights take no gradient, so something must train beside them",
        fix="lora=lora, or model.quantization=none",
        source="arXiv:2305.14314",
    ),
    Rule(
        key="model.quantization_aware",
        when={"model.quantization_aware": True, "model.quantization": "none"},
        why="needs to know which quantization to simulate",
        fix="model.quantization=4bit model.quantization_aware=true",
    ),
    Rule(
        key="model.quantization_aware",
        when={"model.quantization_aware": True, "backend": "unsloth"},
        why="Unsloth replaces the linear layers that torchao's fake quantization wraps",
        fix="backend=transformers, or model.quantization_aware=false",
    ),
    Rule(
        key="lora.use_dora",
        when={
            "lora.use_dora": True,
            "model.quantization": "8bit",
            "model.quantization_aware": False,
            "device": "cpu",
        },
        why="DoRA reads the frozen weights at each step, and PEFT 0.21 loses their 8-bit scales by that on a CPU",
        fix="model.quantization=4bit or none, or lora=lora",
        source="peft.utils.integrations.dequantize_module_weight",
    ),
    Rule(
        key="model.quantization_aware",
        when={"model.quantization_aware": True, "model.moe": True},
        why="experts are fused in one parameter of three dimensions, which torchao's fake quantization passes by",
        fix="model.quantization_aware=false, or a dense model",
    ),
    Rule(
        key="model.quantization_aware",
        when={"model.quantization_aware": True, "distributed": OneOf("zero3", *FSDP.values)},
        why="a layer simulates its weight and adapter folded together, and sharding leaves no device with both whole",
        fix="distributed=ddp or zero2, or model.quantization_aware=false",
    ),
    Rule(
        key="lora.dropout",
        when={"model.quantization_aware": True, "lora.use_dora": True, "lora.dropout": Above(0)},
        why="PEFT's DoRA with dropout computes with the plain base weights beside the simulated ones",
        fix="lora.dropout=0.0, or lora=lora",
    ),
    _idle("model.quantization_aware", False, "model.quantization_group_size", 32),
    Rule(
        key="model.dtype",
        when={"model.dtype": "float16", "device": "cpu"},
        why="float16 training needs loss scaling on a GPU; a CPU has no fast float16 arithmetic",
        fix="model.dtype=auto",
    ),
    Rule(
        key="model.dtype",
        when={"model.dtype": "float16", "lora": "none"},
        why="float16 weights lose small updates, and torch's gradient scaler refuses float16 gradients",
        fix="model.dtype=bfloat16 or float32, or lora=lora",
    ),
    # Packing
    Rule(
        key="training.packing",
        when={"training.packing": True, "task": Not("sft", "pretrain")},
        why="this task trains on pairs or generated rows, which have no packing",
        fix="training.packing=false",
    ),
    Rule(
        key="training.packing",
        when={"training.packing": True, "backend": "unsloth", "device": "cpu"},
        why="Unsloth's CPU backend turns packing off",
        fix="backend=transformers, or training.packing=false",
        source=UNSLOTH_CPU,
    ),
    Rule(
        key="data.on_too_long",
        when={"training.packing": True, "task": "pretrain", "data.on_too_long": Not("truncate")},
        why="packed documents are cut where a row is full and go on in the next, so none is too long",
        fix="data.on_too_long=truncate, or training.packing=false",
    ),
    # Unsloth
    Rule(
        key="task",
        when={"backend": "unsloth", "device": "cpu", "task": Not("sft")},
        why="Unsloth has no GPU here (device=cpu), and its CPU backend trains only SFT",
        fix="backend=transformers, task=sft, or launch.device=cuda to plan for a GPU",
        source=UNSLOTH_CPU,
    ),
    Rule(
        key="model.quantization",
        when={"backend": "unsloth", "device": "cpu", "model.quantization": "8bit"},
        why="Unsloth's CPU backend loads 4-bit or plain weights",
        fix="model.quantization=4bit or none, or backend=transformers",
        source=UNSLOTH_CPU,
    ),
    Rule(
        key="optim",
        when={"backend": "unsloth", "device": "cpu", "optim": "adamw_8bit"},
        why="Unsloth's CPU backend puts AdamW in the place of 8-bit optimizers",
        fix="optim=adamw, or backend=transformers",
        source=UNSLOTH_CPU,
    ),
    Rule(
        key="backend",
        when={"backend": "unsloth", "distributed": Not("none", "ddp")},
        why="Unsloth trains on one device or with DDP; it does not shard",
        fix="distributed=none, or backend=transformers",
    ),
    Rule(
        key="backend",
        when={"backend": "unsloth", "device": "cpu", "distributed": Not("none")},
        why="Unsloth's CPU backend is one process",
        fix="distributed=none, or backend=transformers",
        source=UNSLOTH_CPU,
    ),
    Rule(
        key="backend.kernels",
        when={"backend": "unsloth", "backend.kernels": "stock"},
        why="Unsloth always trains with its own kernels",
        fix="backend.kernels=auto, or backend=transformers",
    ),
    # Devices
    Rule(
        key="training.use_liger",
        when={"training.use_liger": True, "device": "cpu"},
        why="Liger's kernels are written in Triton, which needs a GPU",
        fix="training.use_liger=false, or launch.device=cuda to plan for a GPU",
    ),
    Rule(
        key="training.use_liger",
        when={"training.use_liger": True, "backend": "unsloth"},
        why="both replace the same layers with their own kernels",
        fix="training.use_liger=false, or backend=transformers",
    ),
    Rule(
        key="training.use_liger",
        when={"training.use_liger": True, "backend.kernels": "stock"},
        why="backend.kernels=stock asks for the libraries' own code, and Liger replaces it",
        fix="training.use_liger=false, or backend.kernels=auto",
    ),
    Rule(
        key="training.use_liger",
        when={"training.use_liger": True, "task": OneOf("ipo", "orpo", "simpo", "reward", "ppo")},
        why="TRL 1.12 has no Liger loss for this task",
        fix="training.use_liger=false",
        source="arXiv:2410.10989",
    ),
    Rule(
        key="training.use_liger",
        when={"training.use_liger": True, "task": "kto"},
        why="TRL 1.12's Liger loss for KTO is another number than the paper's formula gives",
        fix="training.use_liger=false",
        source="arXiv:2402.01306",
    ),
    Rule(
        key="training.use_liger",
        when={"training.use_liger": True, "task": "dpo", "task.precompute_ref": True},
        why="Liger's loss makes the reference's log-probabilities itself",
        fix="training.use_liger=false, or task.precompute_ref=false",
    ),
    Rule(
        key="training.use_liger",
        when={"training.use_liger": True, "task": "dpo", "task.label_smoothing": Above(0)},
        why="conservative DPO is two of TRL's losses added, and Liger's is one",
        fix="training.use_liger=false, or task.label_smoothing=0.0",
    ),
    Rule(
        key="training.use_liger",
        when={"training.use_liger": True, "model.moe": True},
        why="Liger replaces the experts and their router's loss, whose settings nothing could prove then",
        fix="training.use_liger=false, or a dense model",
    ),
    Rule(
        key="training.use_flash_attn",
        when={"training.use_flash_attn": OneOf("v2", "v3"), "device": "cpu"},
        why="FlashAttention's kernels are CUDA kernels",
        fix="training.use_flash_attn=auto",
        source="arXiv:2307.08691",
    ),
    Rule(
        key="training.use_flash_attn",
        when={"training.use_flash_attn": OneOf("v2", "v3"), "model.dtype": "float32"},
        why="FlashAttention computes in 16 bits",
        fix="model.dtype=auto, or training.use_flash_attn=auto",
        source="arXiv:2307.08691",
    ),
    Rule(
        key="training.use_flash_attn",
        when={"training.use_flash_attn": Not("auto"), "backend": "unsloth"},
        why="Unsloth chooses its attention itself",
        fix="training.use_flash_attn=auto, or backend=transformers",
    ),
    Rule(
        key="optim",
        when={"optim": "paged_adamw_8bit", "device": "cpu"},
        why="paging moves state between GPU and host memory",
        fix="optim=adamw_8bit",
    ),
    # Distribution
    Rule(
        key="distributed.processes",
        when={"distributed": "none", "distributed.processes": Above(1)},
        why="distributed=none is one process",
        fix="distributed=ddp, or distributed.processes=1",
    ),
    Rule(
        key="distributed.nodes",
        when={"distributed": "none", "distributed.nodes": Above(1)},
        why="distributed=none is one process on one node",
        fix="distributed=ddp, or distributed.nodes=1",
    ),
    Rule(
        key="distributed.nodes",
        when={"launch": Not("slurm"), "distributed.nodes": Above(1)},
        why="only SLURM starts a run on several machines at once",
        fix="launch=slurm, or distributed.nodes=1",
    ),
    Rule(
        key="distributed.processes",
        when={"distributed": Not("none"), "distributed.world": 1},
        why="one process has nobody to share with",
        fix="distributed.processes=2 or more, or distributed=none",
    ),
    Rule(
        key="model.quantization",
        when={
            "distributed": SHARDED,
            "model.quantization": Not("none"),
            "model.quantization_aware": False,
        },
        why="quantized weights are bytes beside their scales, which are not cut with them, and the adapters that TRL"
        " makes bfloat16 beside them would be stepped as float32 copies",
        fix="distributed=ddp, or model.quantization=none",
        source="arXiv:2305.14314",
    ),
    Rule(
        key="optim",
        when={"distributed": SHARDED, "optim": OneOf("adamw_8bit", "paged_adamw_8bit", "lion")},
        why="bitsandbytes' optimizers take whole tensors, in blocks of their own, and sharding cuts both",
        fix="optim=adamw, or distributed=ddp",
        source="arXiv:2110.02861",
    ),
    Rule(
        key="optim",
        when={"distributed": SHARDED, "optim": "adafactor"},
        why="Adafactor factors a matrix by its rows and columns, and sharding leaves a process with a part of it",
        fix="optim=adamw, or distributed=ddp",
        source="arXiv:1804.04235",
    ),
    Rule(
        key="optim",
        when={"distributed": SHARDED, "optim": "schedule_free"},
        why="the optimizer switches the weights between two points, and a cut model's shares are not switched",
        fix="optim=adamw, or distributed=ddp",
        source="arXiv:2405.15682",
    ),
    Rule(
        key="model.dtype",
        when={"distributed": SHARDED, "model.dtype": "float16"},
        why="float16 needs loss scaling, which has not been proved on shares of gradients",
        fix="model.dtype=auto, or distributed=ddp",
    ),
    Rule(
        key="model.dtype",
        when={"distributed": ZERO, "model.dtype": "bfloat16", "lora": "none"},
        why="ZeRO steps float32 copies of 16-bit weights, which is another training than that of one process",
        fix="model.dtype=auto or float32, or distributed=fsdp_full_shard",
        source="arXiv:1910.02054",
    ),
    Rule(
        key="training.loss_watchdog",
        when={"distributed": ZERO, "training.loss_watchdog": True},
        why="DeepSpeed keeps the gradients, and tells their norm when the step is taken",
        fix="training.loss_watchdog=false, or distributed=ddp",
    ),
    Rule(
        key="distributed",
        when={"distributed": OneOf("zero3", *FSDP.values), "task": "grpo"},
        why="answers are generated by the whole model, and a cut one would be gathered anew for every token",
        fix="distributed=ddp or zero2",
        source="arXiv:2402.03300",
    ),
    Rule(
        key="distributed",
        when={"distributed": "zero3", "model.moe": True},
        why="ZeRO-3 gathers a module's weights as its forward begins, and a router and its experts are read elsewhere",
        fix="distributed=fsdp_full_shard or zero2, or a dense model",
        source="deepspeed.runtime.zero.parameter_offload",
    ),
    Rule(
        key="distributed",
        when={"distributed": "zero3", "task": "reward"},
        why="ZeRO-3 has not gathered a reward model's new head where PEFT and TRL read it",
        fix="distributed=fsdp_full_shard or zero2",
    ),
    Rule(
        key="training.use_liger",
        when={"distributed": OneOf("zero3", *FSDP.values), "training.use_liger": True},
        why="Liger's loss reads the head's weights outside the model's forward pass, where they are cut",
        fix="training.use_liger=false, or distributed=ddp or zero2",
    ),
    Rule(
        key="distributed",
        when={"task": "ppo", "distributed": Not("none")},
        why="TRL 1.12's PPO reads policy and value model through one wrapper, which several processes hide",
        fix="distributed=none",
    ),
    Rule(
        key="longctx.use_ring_attention",
        when={"longctx.use_ring_attention": True, "task": Not("sft", "pretrain")},
        why="sequences are spread over devices for SFT and pretraining only",
        fix="longctx.use_ring_attention=false",
    ),
    Rule(
        key="longctx.use_ring_attention",
        when={"longctx.use_ring_attention": True, "distributed": "none"},
        why="a ring needs several processes",
        fix="distributed=ddp distributed.processes=4 longctx.ring_size=4",
        source="arXiv:2310.01889",
    ),
    Rule(
        key="longctx.ring_size",
        when={RING: True, "longctx.ring_size": Above(1), "longctx.whole_rings": False},
        why="the processes do not make up whole rings of this size",
        fix="distributed.processes that are a multiple of longctx.ring_size",
    ),
    Rule(
        key="data.streaming",
        when={RING: True, "data.streaming": True},
        why="a ring is several processes, each of which would read and tokenise the whole stream",
        fix="data.streaming=false, or longctx.use_ring_attention=false",
    ),
    Rule(
        key=RING,
        when={RING: True, "backend": "unsloth"},
        why="Unsloth brings attention of its own, which takes whole rows",
        fix="backend=transformers, or longctx.use_ring_attention=false",
    ),
    Rule(
        key="longctx.rope_scaling_type",
        when={RING: True, "longctx.rope_scaling_type": OneOf("dynamic", "longrope")},
        why="its frequencies follow the length of a row, of which each process of a ring sees a part",
        fix="longctx=yarn",
        source="arXiv:2309.00071",
    ),
    Rule(
        key="training.use_flash_attn",
        when={RING: True, "training.use_flash_attn": OneOf("v2", "v3")},
        why="a ring merges parts by their log-sum-exp, which soup takes from the flash kernels in torch itself",
        fix="training.use_flash_attn=auto",
        source="arXiv:2310.01889",
    ),
    Rule(
        key="training.use_flash_attn",
        when={RING: True, "training.use_flash_attn": "off", "device": "cuda"},
        why="on a GPU a ring computes by the flash kernels in torch itself",
        fix="training.use_flash_attn=auto",
    ),
    Rule(
        key="training.use_liger",
        when={RING: True, "training.use_liger": True},
        why="soup has not proved Liger's fused loss on parts of rows",
        fix="training.use_liger=false",
    ),
    Rule(
        key="training.neftune_alpha",
        when={RING: True, "training.neftune_alpha": Above(0)},
        why="the noise is scaled by the length of a row, of which each process of a ring sees a part",
        fix="training.neftune_alpha=0.0",
        source="arXiv:2310.05914",
    ),
    Rule(
        key="training.curriculum_metric",
        when={RING: True, "training.curriculum": True, "training.curriculum_metric": "loss"},
        why="the base model's loss is measured on whole rows in one process, which a ring is there to spare",
        fix="training.curriculum_metric=length",
    ),
    Rule(
        key="training.moe_aux_loss_coeff",
        when={RING: True, "model.balanced": True, "training.moe_aux_loss_coeff": Not(0.0)},
        why="the balancing loss is no sum over tokens, and each process of a ring would balance its part of a row",
        fix="training.moe_aux_loss_coeff=0.0",
        source="arXiv:2101.03961",
    ),
    Rule(
        key="longctx.rope_scaling_type",
        when={"longctx.rope_scaling_type": OneOf("dynamic", "longrope"), "task": OneOf("grpo", "ppo")},
        why="its frequencies follow the length, so what is generated stands on keys of other frequencies than the"
        " passes that learn from it have",
        fix="longctx=yarn",
        source="arXiv:2309.00071",
    ),
    Rule(
        key="longctx",
        when={"longctx": Not("none"), "backend": "unsloth"},
        why="Unsloth loads the model itself, and soup has not proved yet which scaling is in force then",
        fix="backend=transformers, or longctx=none",
    ),
    _idle(RING, False, "longctx.ring_size", 1),
    _idle(RING, False, "longctx.ring_layout", "zigzag"),
    Rule(
        key="longctx.ring_size",
        when={"longctx.use_ring_attention": True, "longctx.ring_size": 1},
        why="a ring of one device spreads nothing",
        fix="longctx.ring_size=2 or more",
        source="arXiv:2310.01889",
    ),
    # SLURM
    Rule(
        key="launch.gpus",
        when={"launch": "slurm", "device": "cuda", "launch.gpus": 0},
        why="a job that has no GPU cannot train on one",
        fix="launch.gpus=auto, or launch.device=cpu",
    ),
    Rule(
        key="launch.gpus",
        when={"launch": "slurm", "device": "cpu", "launch.gpus": Above(0)},
        why="training on the CPU would leave them idle",
        fix="launch.gpus=auto, or launch.device=cuda",
    ),
    Rule(
        key="launch.gpus",
        when={"launch": "slurm", "distributed": Not("none"), "launch.gpus_fit": False},
        why="each process trains on a GPU of its own",
        fix="launch.gpus=auto",
    ),
    Rule(
        key="launch.gpus",
        when={"launch": "slurm", "distributed": "none", "launch.gpus": Above(1)},
        why="distributed=none is one process, which trains on one GPU",
        fix="launch.gpus=auto",
    ),
    # Features that need another
    Rule(
        key="training.moe_lora",
        when={"training.moe_lora": True, "model.moe": False},
        why="this model has no experts",
        fix="training.moe_lora=false, or an MoE model",
    ),
    Rule(
        key="training.moe_lora",
        when={"training.moe_lora": True, "lora": "none"},
        why="there are no adapters to place on experts",
        fix="lora=lora, or training.moe_lora=false",
    ),
    Rule(
        key="training.moe_aux_loss_coeff",
        when={"training.moe_aux_loss_coeff": Not(None), "model.moe": False},
        why="this model has no router whose loss it could weigh",
        fix="training.moe_aux_loss_coeff=null, or an MoE model",
    ),
    Rule(
        key="training.moe_aux_loss_coeff",
        when={"training.moe_aux_loss_coeff": Not(None), "model.moe": True, "model.balanced": False},
        why="TRL's trainers are not known to add a balancing loss of this family (DeepSeek's class has none)",
        fix="training.moe_aux_loss_coeff=null",
        source="soup.rules.moe; arXiv:2408.15664",
    ),
    Rule(
        key="training.moe_aux_loss_coeff",
        when={"training.moe_aux_loss_coeff": Not(None), "task": OneOf("reward", "ppo")},
        why="TRL's trainer of this task adds no balancing loss, so nothing would read it",
        fix="training.moe_aux_loss_coeff=null",
    ),
    Rule(
        key="lora.use_dora",
        when={"training.moe_lora": True, "lora.use_dora": True},
        why="PEFT has no magnitudes for the columns of fused experts",
        fix="lora=lora, or training.moe_lora=false",
        source="peft.tuners.lora.layer.ParamWrapper",
    ),
    Rule(
        key="lora.dropout",
        when={"training.moe_lora": True, "lora.dropout": Above(0)},
        why="PEFT adds an expert's adapter to its weights, so there is no input of its own to drop",
        fix="lora.dropout=0.0, or training.moe_lora=false",
        source="peft.tuners.lora.layer.ParamWrapper",
    ),
    Rule(
        key="lora.target_modules",
        when={"model.moe": True, "lora.names_experts": True},
        why="PEFT reads such names as this model's fused experts or its router, whatever training.moe_lora says",
        fix="lora.target_modules=all-linear or names of attention's layers; training.moe_lora=true for experts",
        source="peft.utils.transformers_weight_conversion",
    ),
    Rule(
        key="model.quantization",
        when={"model.moe": True, "model.quantization": Not("none")},
        why="only linear layers are quantized, and the experts, most of an MoE model, are fused parameters",
        fix="model.quantization=none, or a dense model",
        source="transformers.integrations.bitsandbytes",
    ),
    Rule(
        key="backend",
        when={"backend": "unsloth", "model.moe": True},
        why="Unsloth places adapters on experts by rules of its own, and no MoE model has been tried with it here",
        fix="backend=transformers, or a dense model",
        source="unsloth.models.llama",
    ),
    Rule(
        key="distributed",
        when={"training.moe_lora": True, "distributed": OneOf("zero3", *FSDP.values)},
        why="PEFT puts another tensor in an expert parameter's place in each pass, which sharding has taken apart",
        fix="distributed=ddp, or training.moe_lora=false",
        source="peft.tuners.lora.layer.ParamWrapper",
    ),
    Rule(
        key="training.freeze_ratio",
        when={"training.freeze_layers": Above(0), "training.freeze_ratio": Above(0)},
        why="freeze_layers says how many layers freeze already",
        fix="training.freeze_layers=0, or training.freeze_ratio=0.0",
    ),
    Rule(
        key="training.freeze_ratio",
        when={"training.freeze_ratio": 1},
        why="nothing would train",
        fix="training.freeze_ratio below 1",
    ),
    Rule(
        key="training.curriculum",
        when={"training.curriculum": True, "task": OneOf("grpo", "ppo")},
        why="rows are generated while training, so their length and loss are not known before",
        fix="training.curriculum=false",
    ),
    Rule(
        key="data.streaming",
        when={"data.streaming": True, "training.curriculum": True},
        why="a curriculum sorts all rows before training, and a stream has no end",
        fix="data.streaming=false, or training.curriculum=false",
    ),
    Rule(
        key="training.max_steps",
        when={"data.streaming": True, "training.max_steps": None},
        why="a stream has no length, so the schedule needs its number of steps",
        fix="training.max_steps=1000, or data.streaming=false",
    ),
    Rule(
        key="data.streaming",
        when={"data.streaming": True, "task": "grpo"},
        why="what rewards compare with is checked in all rows before a model is loaded",
        fix="data.streaming=false",
    ),
    Rule(
        key="data.streaming",
        when={"data.streaming": True, "task": "ppo"},
        why="PPO pads with a token that stands in no prompt, so all prompts are read before training",
        fix="data.streaming=false",
    ),
    Rule(
        key="data.streaming",
        when={"data.streaming": True, "distributed": Not("none")},
        why="every process would read and tokenise the whole stream, to train on a part of it",
        fix="distributed=none, or data.streaming=false",
    ),
    Rule(
        key="data.streaming",
        when={"data.streaming": True, "training.packing": True},
        why="best-fit packing sorts all rows by length before training",
        fix="data.streaming=false, or training.packing=false",
        source="arXiv:2404.10830",
    ),
    Rule(
        key="data.streaming",
        when={"data.streaming": True, "task.precompute_ref": True},
        why="the table of the reference's log-probabilities is made of all rows before training",
        fix="data.streaming=false, or task.precompute_ref=false",
    ),
    Rule(
        key="data.eval_fraction",
        when={"data.streaming": True, "data.eval_fraction": Above(0)},
        why="rows are drawn to be held out once all are read",
        fix="data.eval=FILE data.eval_fraction=0.0, or data.streaming=false",
    ),
    Rule(
        key="data.weights",
        when={"data.weighed": False},
        why="needs one number for each of several sources of data.train",
        fix="data.weights=null, or as many as data.train=[a.jsonl,b.jsonl]",
    ),
    Rule(
        key="data.eval_fraction",
        when={"data.eval": Not(None), "data.eval_fraction": Above(0)},
        why="data.eval names the held-out rows already",
        fix="data.eval_fraction=0.0, or data.eval=null",
    ),
    Rule(
        key="training.curriculum",
        when={"training.curriculum": True, "task": "kto"},
        why="KTO pairs each answer with a neighbour of its batch, so its batches are the same in every epoch",
        fix="training.curriculum=false",
        source="arXiv:2402.01306",
    ),
    Rule(
        key="training.curriculum_metric",
        when={"training.curriculum_metric": "loss", "task": "reward"},
        why="a reward model's head is drawn from the seed, so its loss before training says nothing of the rows",
        fix="training.curriculum_metric=length or difficulty",
    ),
    _idle("training.curriculum", False, "training.curriculum_metric", "length"),
    _idle("training.curriculum", False, "training.curriculum_buckets", 4),
    _idle("training.loss_watchdog", False, "training.loss_watchdog_threshold", 10.0),
    _idle("training.loss_watchdog", False, "training.loss_watchdog_patience", 5),
    _idle("training.loss_watchdog", False, "training.loss_watchdog_action", "stop"),
    # Tasks
    Rule(
        key="training.batch_size",
        when={"task": "kto", "training.batch_size": 1},
        why="KTO's KL is that of answers paired with another prompt of the same batch, and there is no other",
        fix="training.batch_size=2 or more, with less of training.gradient_accumulation_steps",
        source="arXiv:2402.01306",
    ),
    Rule(
        key="task.num_generations",
        when={"task": "grpo", "task.whole_groups": False},
        why="batch_size x gradient_accumulation_steps must hold whole groups of answers to one prompt",
        fix="training.batch_size=8 task.num_generations=4, for example",
        source="arXiv:2402.03300",
    ),
    Rule(
        key="task.reward_weights",
        when={"task": "grpo", "task.weighed": False},
        why="needs one weight for each of task.rewards",
        fix="task.reward_weights=null, or as many as task.rewards",
    ),
    Rule(
        key="data.eval",
        when={"task": "ppo", "data.eval": Not(None)},
        why="TRL's PPO trainer does not evaluate, so nothing would read it",
        fix="data.eval=null",
    ),
    Rule(
        key="data.eval_fraction",
        when={"task": "ppo", "data.eval_fraction": Above(0)},
        why="TRL's PPO trainer does not evaluate, so rows would be held out for nothing",
        fix="data.eval_fraction=0.0",
    ),
    Rule(
        key="lora.loraplus_lr_ratio",
        when={"task": "ppo", "lora.loraplus_lr_ratio": Above(0)},
        why="PPO's value model trains in all its weights beside the adapters, and LoRA+ has no rate for those",
        fix="lora=lora",
        source="arXiv:2402.12354",
    ),
    Rule(
        key="training.loss_watchdog",
        when={"task": "ppo", "training.loss_watchdog": True},
        why="TRL's PPO loop asks nobody before it takes a step",
        fix="training.loss_watchdog=false",
    ),
    Rule(
        key="lora.dropout",
        when={"task": "ppo", "lora.dropout": Above(0)},
        why="TRL's PPO trainer turns dropout off: old and new probabilities must come from one policy",
        fix="lora.dropout=0.0",
    ),
    Rule(
        key="task.reward_model",
        when={"task": "ppo", "task.reward_model": None},
        why="PPO learns from a reward model",
        fix="task.reward_model=FOLDER, as `python -m soup task=reward` trains one from preference pairs",
    ),
)
