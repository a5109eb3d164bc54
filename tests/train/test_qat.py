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


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(torch.arange(3, 40)[None]).logits.float(), sys.argv[2])
kinds = {type(m.weight).__name__ for m in model.modules() if isinstance(m, torch.nn.Linear)}
print(sorted(kinds))
"""


@pytest.fixture
def finished(build, place, tree, tmp_path):
    """`finished("lora=dora")`: a trained build, and its run with the model folder saved."""

    def trained(*overrides):
        from soup.train.finish import save_model

        words = ("training.max_steps=3", "optim.lr=1e-2", "model.dtype=float32", *overrides)
        built = build(*words)
        run = place(tree(*words))
        built.trainer.metrics_file = tmp_path / "metrics.jsonl"
        built.trainer.train()
        save_model(run, built, {"step": 3, "loss": 1.5})
        return built, run

    return trained


def logits(model):
    import torch

    model.eval()
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits.float()


@pytest.mark.parametrize(
    "overrides",
    [
        (*AWARE, "lora=none"),
        (*AWARE, "lora=dora", "lora.target_modules=[q_proj,down_proj]", "model.quantization_group_size=16"),
        ("model.quantization=8bit", "model.quantization_aware=true", "lora=rslora"),
    ],
    ids=" ".join,
)
def test_the_export_reloads_as_what_was_trained(finished, tmp_path, capsys, overrides):
    import subprocess
    import sys

    import torch
    from transformers import AutoModelForCausalLM

    from soup.cli.main import main

    built, run = finished(*overrides)
    trained = logits(built.model)
    assert main(["runs", "export", "--quantized", run.id, f"run.root={run.folder.parent}"]) == 0
    folder = run.folder / "quantized"
    assert str(folder) in capsys.readouterr().out.replace("\n", "")
    words = [sys.executable, "-c", RELOAD, str(folder), str(tmp_path / "logits.pt")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "IntxUnpackedToInt8Tensor" in done.stdout
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), trained, atol=1e-4)
    untrained = logits(AutoModelForCausalLM.from_pretrained(built.model_folder))
    assert (trained - untrained).abs().max() > 1e-2
    assert [path.name for path in run.folder.iterdir() if path.name.startswith(".quantized")] == []
