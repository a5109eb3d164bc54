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


@pytest.mark.parametrize("choice", ["lora=lora", pytest.param("lora=none", marks=pytest.mark.slow)])
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
        pytest.param((*AWARE, "lora=none"), marks=pytest.mark.slow, id="all weights"),
        pytest.param(
            (
                *AWARE,
                "lora=dora",
                "lora.target_modules=[q_proj,down_proj]",
                "model.quantization_group_size=16",
            ),
            marks=pytest.mark.slow,
            id="dora on some",
        ),
        pytest.param(
            ("model.quantization=8bit", "model.quantization_aware=true", "lora=rslora"),
            marks=pytest.mark.slow,
            id="8 bits",
        ),
    ],
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


def test_what_is_saved_has_the_names_and_weights_of_a_plain_model(finished):
    import torch
    from transformers import AutoModelForCausalLM

    built, run = finished(*AWARE, "lora=none")
    loaded, report = AutoModelForCausalLM.from_pretrained(run.model, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    live = built.model.state_dict()
    assert live.keys() == loaded.state_dict().keys()
    assert all(torch.equal(live[name], one) for name, one in loaded.state_dict().items())


def test_a_saved_adapter_loads_with_peft(finished):
    import torch
    from peft import AutoPeftModelForCausalLM
    from peft.utils import get_peft_model_state_dict

    built, run = finished(*AWARE, "lora=dora")
    loaded = get_peft_model_state_dict(AutoPeftModelForCausalLM.from_pretrained(run.model))
    live = get_peft_model_state_dict(built.model)
    assert live.keys() == loaded.keys()
    assert all(torch.equal(live[name], one) for name, one in loaded.items())


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["lora=none", "lora=lora", "lora=dora"])
def test_a_stopped_run_goes_on_bit_for_bit(server, place, tree, unequal, choice, stop_at):
    tree = tree(
        *AWARE,
        choice,
        "training.max_steps=8",
        "training.save_steps=4",
        "training.logging_steps=1",
        "optim.lr=5e-3",
    )
    whole, stopped = place(tree, "whole"), place(tree, "stopped")
    assert server(whole).wait() == 0
    assert server(stopped, code=stop_at(3)).wait() == 130
    assert server(stopped).wait() == 0
    assert unequal(whole, stopped) == []


GROUP = 64
LEARN = {  # 24 documents, each seen 200 or 100 times
    "lora=none": ("optim.lr=5e-3", "training.max_steps=600"),
    "lora=lora": ("optim.lr=5e-3", "training.max_steps=300", "lora.r=32"),
}


def losses(folder, rows):
    """Mean loss in nats a token with the weights as they are, and with them in torchao's integers of 4 bits."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
    found = []
    for quantized in (False, True):
        if quantized:
            quantize_(model.model.layers, config)
        with torch.no_grad():
            found.append(float(sum(model(input_ids=row, labels=row).loss for row in rows) / len(rows)))
    return found


def documents(run):
    """The rows that the run trained on, each (1, T)."""
    import pyarrow as pa
    import torch

    from soup import schema
    from soup.data.prepare import prepare
    from soup.inputs import data_arguments
    from soup.model import source

    config = schema.check(run.tree())
    entry = prepare(**data_arguments(config, source.folder(config.model)))["train"]
    with pa.memory_map(str(entry.open())) as file:
        return [torch.tensor([ids]) for ids in pa.ipc.open_stream(file).read_all()["input_ids"].to_pylist()]


@pytest.mark.slow
@pytest.mark.parametrize("choice", LEARN)
def test_trained_for_integers_it_loses_less_by_them(server, place, tree, choice):
    """Than the same training without. Where all weights train until they know the documents, rounding them to 4 bits
    takes that from 0.015 nats to 0.073, and this from 0.024 to 0.015.

    Adapters on a random base learn little: 0.05 against -0.01, and the loss itself stays the higher one with QAT.
    """
    from soup.model.merge import merge

    words = ("task=pretrain", choice, *LEARN[choice], "model.dtype=float32", "data.max_samples=24")
    words += ("training.batch_size=8", "training.save_steps=1000", "data.max_length=96")
    found = {}
    for aware in (False, True):
        run = place(tree(*words, *((*AWARE, f"model.quantization_group_size={GROUP}") if aware else ())))
        process = server(run)
        assert process.wait() == 0, process.stdout.read()
        folder = run.model
        if choice != "lora=none":
            folder = run.folder / "merged"
            merge(run.model, folder)
        found[aware] = losses(folder, documents(run))
    (plain, plain_rounded), (aware, aware_rounded) = found[False], found[True]
    assert aware_rounded - aware < plain_rounded - plain - 0.03
    if choice == "lora=none":
        assert aware_rounded < plain_rounded / 2


def test_a_run_that_was_not_trained_for_it_is_not_quantized(place, tree, capsys):
    from soup.cli.main import main

    run = place(tree())
    run.model.mkdir()
    assert main(["runs", "export", "--quantized", run.id, f"run.root={run.folder.parent}"]) == 2
    assert "was not trained to be quantized" in capsys.readouterr().err
