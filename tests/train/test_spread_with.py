"""What several processes go together with: every setting proved in each of them, two steps trained, a model left."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.slow
QAT = "model.quantization=4bit model.quantization_aware=true"
TOGETHER = {
    "GRPO": "distributed=ddp task=grpo training.batch_size=4 lora.r=4",
    "GRPO, ZeRO": "distributed=zero2 task=grpo training.batch_size=4 lora.r=4",
    "KTO": "distributed=ddp task=kto lora=none",
    "ORPO": "distributed=fsdp_full_shard task=orpo",
    "SimPO": "distributed=zero3 task=simpo",
    "reward": "distributed=fsdp_full_shard task=reward lora=none",
    "reward, ZeRO": "distributed=zero2 task=reward",
    "reward, ZeRO-3": "distributed=zero3 task=reward lora=none",
    "a table of the reference": "distributed=fsdp_shard_grad task=dpo lora=none task.precompute_ref=true",
    "packing and a curriculum": "distributed=ddp training.packing=true training.curriculum=true",
    "a curriculum by loss": "distributed=zero2 training.curriculum=true training.curriculum_metric=loss",
    "checkpointing": "distributed=fsdp_full_shard training.gradient_checkpointing=true lora.dropout=0.1",
    "checkpointing, ZeRO": "distributed=zero3 training.gradient_checkpointing=true lora=none",
    "checkpointing, DDP": "distributed=ddp training.gradient_checkpointing=true",
    "DoRA": "distributed=fsdp_full_shard lora=dora",
    "DoRA, ZeRO": "distributed=zero3 lora=dora",
    "LoRA+": "distributed=zero2 lora=loraplus",
    "LoRA+, FSDP": "distributed=fsdp_full_offload lora=loraplus",
    "4 bits": "distributed=ddp model.quantization=4bit",
    "8 bits": "distributed=ddp model.quantization=8bit",
    "simulated bits": f"distributed=ddp {QAT}",
    "simulated bits, ZeRO": f"distributed=zero2 {QAT} lora=none",
    "a watchdog": "distributed=fsdp_full_shard training.loss_watchdog=true",
    "a watchdog, DDP": "distributed=ddp training.loss_watchdog=true training.loss_watchdog_action=rollback",
    "noise": "distributed=zero3 training.neftune_alpha=5.0",
    "frozen layers": "distributed=fsdp_full_shard training.freeze_layers=1 lora=none",
    "frozen layers, ZeRO": "distributed=zero3 training.freeze_layers=1",
    "rows that fill no batch": "distributed=ddp data.max_samples=5 data.eval_fraction=0.0",
    "fewer rows than one process takes": "distributed=ddp data.max_samples=1 data.eval_fraction=0.0",
    "rotary scaling": "distributed=ddp longctx=dynamic longctx.rope_factor=4.0",
    "GaLore": "distributed=ddp optim=galore optim.galore_rank=8 optim.galore_update_proj_gap=1 lora=none",
    "Muon": "distributed=ddp optim=muon lora=none",
    "schedule-free": "distributed=ddp optim=schedule_free",
    "16 bits": "distributed=fsdp_full_shard model.dtype=bfloat16 lora=none",
    "no clipping": "distributed=zero2 training.max_grad_norm=0.0",
    "no clipping, FSDP": "distributed=fsdp_shard_grad training.max_grad_norm=0.0",
}
EXPERTS = {
    "experts": "distributed=ddp lora.r=4 training.moe_lora=true",
    "experts, FSDP": "distributed=fsdp_full_shard lora=none training.moe_aux_loss_coeff=0.1",
    "experts, ZeRO": "distributed=zero2 lora=none",
    "experts and a head of its own, ZeRO-3": "distributed=zero3 lora=none",
    "adapters beside experts, ZeRO-3": "distributed=zero3",
    "experts' adapters, ZeRO": "distributed=zero2 training.moe_lora=true",
}


@pytest.mark.parametrize("words", TOGETHER.values(), ids=TOGETHER)
def test_it_trains_with_every_effect_proved(tree, place, several, words):
    _trains(place(tree("training.batch_size=2", "training.max_steps=2", *words.split())), several)


@pytest.mark.parametrize("words", EXPERTS.values(), ids=EXPERTS)
def test_experts_train_with_every_effect_proved(tree, place, several, expert_model, words):
    model = f"model.base={expert_model('mixtral')}"
    _trains(place(tree("training.batch_size=2", "training.max_steps=2", *words.split(), model)), several)


def test_what_the_tracker_said_stays_when_the_shares_are_proved(tree, place, several):
    run = place(tree("distributed=ddp", "training.max_steps=2", "tracking=tensorboard"))
    _trains(run, several)
    said = json.loads(run.effective.read_text())
    assert said["tracking.tensorboard.folder"]["how"] == "read from the open tensorboard"
    assert said["distributed.name"]["ok"]


def _trains(run, several):
    process = several(run, 2)
    status = process.wait()
    notes = [json.loads(path.read_text())["error"] for path in (run.folder / ".ranks").glob("*.json")]
    assert status == 0, notes
    assert run.state() == "finished", run.result()
    effects = json.loads(run.effective.read_text())
    assert [key for key, effect in effects.items() if not effect["ok"]] == []
    assert list(run.model.glob("*.safetensors"))
