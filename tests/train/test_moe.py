"""Mixtures of experts train: two steps of each task, what is saved loads elsewhere, and a resume is bit-equal."""

from __future__ import annotations

import json

import pytest

KINDS = ("mixtral", "qwen3_moe", "deepseek_v3")
EXPERTS = "training.moe_lora=true"
SHORT = ("training.max_steps=2", "training.logging_steps=1", "optim.lr=1e-2")
RUNS = {
    "sft": "task=sft training.packing=true training.gradient_checkpointing=true",
    "dpo": "task=dpo training.moe_aux_loss_coeff=0.1 training.freeze_layers=1",
    "sft, all weights": "lora=none training.moe_aux_loss_coeff=0.1",
    "dpo, tabled reference": "task=dpo task.precompute_ref=true",
    "sft, LoRA+": "lora=loraplus",
    "pretrain": "task=pretrain lora=rslora",
    "kto": "task=kto training.neftune_alpha=5",
    "orpo": "task=orpo training.moe_aux_loss_coeff=0.0",
    "simpo": "task=simpo optim=adafactor",
    "reward": "task=reward",
    "grpo": "task=grpo task.max_completion_length=8",
    "ppo": "task=ppo task.response_length=8",
}
QUICK = {("mixtral", "sft"), ("qwen3_moe", "dpo"), ("deepseek_v3", "sft"), ("mixtral", "sft, all weights")}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=() if (kind, name) in QUICK else pytest.mark.slow)
        for kind in KINDS
        for name in RUNS
    ],
)
def test_it_trains_with_every_effect_proved(expert_model, tree, place, server, scorer, kind, name):
    words = RUNS[name].split()
    if kind == "deepseek_v3":  # refused, as it has no balancing loss
        words = [word for word in words if not word.startswith("training.moe_aux_loss_coeff")]
    if "lora=none" not in words:
        words.append(EXPERTS)
    if "task=ppo" in words:
        words.append(f"task.reward_model={scorer}")
    run = place(tree(f"model.base={expert_model(kind)}", *SHORT, *words))
    process = server(run)
    assert process.wait() == 0, process.stdout.read()
    wrong = {key: one for key, one in json.loads(run.effective.read_text()).items() if not one["ok"]}
    assert wrong == {} and run.state() == "finished"


@pytest.mark.parametrize(
    "processes", [1, pytest.param(2, marks=pytest.mark.slow)], ids=["accumulated", "two processes"]
)
@pytest.mark.parametrize("kind", ["mixtral", pytest.param("olmoe", marks=pytest.mark.slow)])
def test_the_balancing_loss_weighs_as_much_in_parts(
    expert_model, tree, place, server, several, kind, processes
):
    """One batch of four rows, or two of two: the balancing loss is a mean of two, and nearly the same."""
    words = (f"model.base={expert_model(kind)}", "task=pretrain", "lora=none", "model.dtype=float32")
    words += ("training.max_steps=2", "training.logging_steps=1", "training.moe_aux_loss_coeff=3.0")
    whole, parts = place(tree(*words)), ["training.batch_size=2"]
    parts += ["distributed=ddp"] if processes == 2 else ["training.gradient_accumulation_steps=2"]
    cut = place(tree(*words, *parts))
    for run, process in ((whole, server(whole)), (cut, several(cut, 2) if processes == 2 else server(cut))):
        assert process.wait() == 0, process.stdout.read()
        assert run.state() == "finished"
    losses = [[line["loss"] for line in run.lines() if "loss" in line] for run in (whole, cut)]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert losses[0][0] > 9  # the balancing loss is about 2, thrice


def logits(model):
    import torch

    model.eval()
    with torch.no_grad():
        return model.float()(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_load_with_plain_peft_and_merge(expert_model, build, place, tree, tmp_path, kind):
    import torch
    from peft import AutoPeftModelForCausalLM
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from soup.model.merge import merge
    from soup.train.finish import save_model

    words = (f"model.base={expert_model(kind)}", *SHORT, EXPERTS, "model.dtype=float32")
    built, run = build(*words), place(tree(*words))
    before = {n: p.detach().clone() for n, p in built.model.named_parameters()}
    built.trainer.metrics_file = tmp_path / "metrics.jsonl"
    built.trainer.train()
    moved = {n for n, p in built.model.named_parameters() if not torch.equal(p, before[n])}
    assert any(".experts." in name for name in moved) and all("lora_" in name for name in moved)
    save_model(run, built, {"step": 2, "loss": 1.5})
    trained = logits(built.model)
    assert (trained - logits(AutoModelForCausalLM.from_pretrained(expert_model(kind)))).abs().max() > 1e-2
    assert any(".experts." in name for name in load_file(run.model / "adapter_model.safetensors"))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(run.model)), trained)
    merge(run.model, tmp_path / "merged")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert torch.allclose(merged, trained, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]])
def test_a_resume_is_bit_equal(expert_model, tree, place, server, unequal, until, kind):
    import signal

    words = tree(
        f"model.base={expert_model(kind)}",
        EXPERTS,
        "training.max_steps=12",
        "training.save_steps=3",
        "training.logging_steps=1",
        "optim.lr=1e-2",
    )
    whole, broken = place(words, "whole"), place(words, "broken")
    assert server(whole).wait() == 0
    process = server(broken)
    until(process, lambda: broken.last_checkpoint())
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert broken.state() != "finished"
    process = server(broken)
    assert process.wait() == 0, process.stdout.read()
    assert unequal(whole, broken) == []
