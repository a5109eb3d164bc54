"""What soup can train, it proves: every setting of every honest build is in force, and proving leaves no state."""

from __future__ import annotations

import pytest

HONEST = {
    "lora": ("lora.dropout=0.1", "lora.r=4", "lora.alpha=6"),
    "dora": ("lora=dora",),
    "rslora": ("lora=rslora", "lora.r=8"),
    "named modules": ("lora.target_modules=[q_proj,v_proj]",),
    "one module": ("lora.target_modules=down_proj",),
    "a module by its path": ("lora.target_modules=[layers.0.mlp.down_proj]",),
    "all weights": ("lora=none", "optim.weight_decay=0.1"),
    "weight decay": ("optim.weight_decay=0.1",),
    "checkpointing": ("training.gradient_checkpointing=true",),
    "checkpointing, all weights": ("training.gradient_checkpointing=true", "lora=none"),
    "4bit": ("model.quantization=4bit",),
    "4bit checkpointing": ("model.quantization=4bit", "training.gradient_checkpointing=true", "lora=dora"),
    "8bit": ("model.quantization=8bit",),
    "bfloat16": ("model.dtype=bfloat16",),
    "bfloat16, all weights": ("model.dtype=bfloat16", "lora=none"),
    "float32": ("model.dtype=float32",),
    "pretrain": ("task=pretrain",),
    "one epoch": ("training.max_steps=null",),
    "part of an epoch, accumulated with a remainder": (
        "training.max_steps=null",
        "training.epochs=0.37",
        "training.gradient_accumulation_steps=3",
    ),
    "epochs and a part": ("training.max_steps=null", "training.epochs=2.5", "training.batch_size=7"),
    "steps of more than an epoch": ("training.max_steps=200", "training.gradient_accumulation_steps=2"),
    "batch larger than the data": ("training.batch_size=64", "data.max_samples=10"),
    "no clipping": ("training.max_grad_norm=0",),
    "strict clipping": ("training.max_grad_norm=1.0e-6",),
    "loose clipping": ("training.max_grad_norm=1.0e+20",),
    "seeds": ("training.seed=0", "training.data_seed=7"),
    "intervals": ("training.logging_steps=3", "training.save_steps=1", "training.eval_steps=2"),
    "held out": ("data.eval_fraction=0.2",),
    "template": ("model.chat_template={% for m in messages %}{{ m.role + m.content }}{% endfor %}",),
    "frozen layer, adapters above": ("training.freeze_layers=1",),
    "frozen half, all weights": ("training.freeze_ratio=0.5", "lora=none"),
    "frozen layer, one module": ("training.freeze_layers=1", "lora.target_modules=down_proj"),
    "frozen layer, checkpointing": ("training.freeze_layers=1", "training.gradient_checkpointing=true"),
    "frozen layer, checkpointing, all weights": (
        "training.freeze_layers=1",
        "training.gradient_checkpointing=true",
        "lora=none",
    ),
    "frozen layer, 4bit dora": ("training.freeze_layers=1", "model.quantization=4bit", "lora=dora"),
    "watchdog": ("training.loss_watchdog=true",),
    "patient watchdog that rolls back": (
        "training.loss_watchdog=true",
        "training.loss_watchdog_threshold=3.5",
        "training.loss_watchdog_patience=1",
        "training.loss_watchdog_action=rollback",
    ),
    "short rows": ("data.max_length=48",),
}


@pytest.mark.parametrize("overrides", HONEST.values(), ids=HONEST.keys())
def test_every_setting_is_in_force(build, wrong, overrides):
    quoted = [f'{o.split("=")[0]}="{o.split("=", 1)[1]}"' if "{%" in o else o for o in overrides]
    assert wrong(build(*quoted)) == {}


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 0.99])
def test_schedules(build, wrong, scheduler, warmup):
    built = build(f"optim.scheduler={scheduler}", f"optim.warmup_ratio={warmup}", "training.max_steps=37")
    assert wrong(built) == {}
