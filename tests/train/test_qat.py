"""Quantization-aware training, for real: every task, resumed, saved, exported, and worth its while."""

from __future__ import annotations

import json

import pytest

AWARE = ("model.quantization=4bit", "model.quantization_aware=true")
SHORT = ("training.max_steps=2",)
TASKS = {
    "sft": (),
    "pretrain": (),
    "dpo": (),
    "ipo": (),
    "kto": (),
    "orpo": (),
    "simpo": (),
    "reward": (),
    "grpo": ("task.max_completion_length=8", "task.beta=0.1"),
    "ppo": ("task.response_length=8",),
}


@pytest.fixture(scope="module")
def scorer(tiny_model, tmp_path_factory):
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("scorer")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).save_pretrained(folder)
    return folder


@pytest.fixture
def trained(tree, place, server, scorer):
    """`trained("task=dpo")`: a run that trained to its end with every effect proved."""

    def run_of(*words):
        if "task=ppo" in words:
            words = (*words, f"task.reward_model={scorer}")
        run = place(tree(*AWARE, *words))
        process = server(run)
        assert process.wait() == 0, process.stdout.read()
        proved = json.loads(run.effective.read_text())
        assert {key: one for key, one in proved.items() if not one["ok"]} == {}
        return run

    return run_of


@pytest.mark.parametrize("choice", ["lora=lora", "lora=none"])
@pytest.mark.parametrize(("task", "words"), TASKS.items(), ids=TASKS)
def test_every_task_trains(trained, task, words, choice):
    run = trained(f"task={task}", choice, *SHORT, *words)
    assert run.state() == "finished"
