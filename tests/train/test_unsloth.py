"""`backend=unsloth` on this CPU: real runs of Unsloth, each in a process of its own, beside runs of transformers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

pytestmark = pytest.mark.slow

JOB = (
    "training.max_steps=20",
    "training.logging_steps=1",
    "training.save_steps=8",
    "training.eval_steps=10",
    "training.batch_size=2",
    "optim.lr=5e-3",
    "data.max_samples=60",
    "data.eval_fraction=0.1",
)
CHOICES = {
    "adapters": ("lora.dropout=0.1", "training.gradient_accumulation_steps=2", "lora.alpha=12"),
    "all weights": ("lora=none", "optim.weight_decay=0.1", "optim.scheduler=linear"),
    "4bit": ("model.quantization=4bit", "training.gradient_checkpointing=true", "lora.dropout=0.1"),
    "bfloat16": ("model.dtype=bfloat16", "lora=dora", "lora.target_modules=[q_proj,down_proj]"),
    "rslora, noise, a frozen layer, watched, in order": (
        "lora=rslora",
        "training.neftune_alpha=5.0",
        "training.freeze_layers=1",
        "training.loss_watchdog=true",
        "training.curriculum=true",
    ),
    "Muon, in the order of losses": (
        "optim=muon",
        "training.curriculum=true",
        "training.curriculum_metric=loss",
    ),
    "bfloat16, all weights": ("model.dtype=bfloat16", "lora=none"),
    "a stream": ("data.streaming=true", "data.eval_fraction=0.0"),
}
# Imports Unsloth and what a training process imports, then forks one for each line it reads.
SERVER = """
import json, os, sys
from soup.device import resolve
from soup.model import unsloth
unsloth.take_over(resolve("cpu"))
import soup.train.job, soup.train.__main__ as training
print("READY", flush=True)
for line in sys.stdin:
    words, code, out = json.loads(line)
    if (pid := os.fork()) == 0:
        try:
            os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
            exec(code)
            os._exit(training.main(words))
        finally:
            os._exit(99)
    print("STATUS", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
# Runs soup.train, and writes down what was loaded before its first import of a library, and in which order those came.
WATCHED = """
import json, os, sys
import soup.train.__main__ as training
seen = [name for name in ("torch", "datasets", "transformers", "trl", "peft") if name in sys.modules]
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("unsloth", "transformers", "trl", "peft") and name not in seen:
            seen.append(name)
sys.meta_path.insert(0, Finder())
status = training.main(sys.argv[1:])
with open(os.environ["SEEN"], "w") as file:
    json.dump(seen, file)
sys.exit(status)
"""


def answer(process, word):
    """The rest of the next line that begins with the word; libraries print between."""
    for line in process.stdout:
        if line.startswith(word):
            return line.removeprefix(word).strip()
    pytest.fail(f"Unsloth's process ended with {process.wait()}")


@pytest.fixture(scope="module")
def unsloth(tmp_path_factory):
    """`unsloth(run)` trains a run: exit status, and what the terminal showed. `code` is a sabotage, run first."""
    folder = tmp_path_factory.mktemp("unsloth")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    answer(process, "READY")

    def trained(run, *words, code=""):
        out = folder / run.folder.parent.name
        out.unlink(missing_ok=True)
        process.stdin.write(json.dumps([[*words, str(run.folder)], code, str(out)]) + "\n")
        process.stdin.flush()
        return int(answer(process, "STATUS")), out.read_text()

    yield trained
    process.stdin.close()
    process.wait(60)


@pytest.fixture(scope="module")
def trained(unsloth, place_below, tree, tmp_path_factory):
    """`trained("4bit")`: that choice's finished run with Unsloth, trained once."""
    root, runs = tmp_path_factory.mktemp("runs"), {}

    def run(name):
        if name not in runs:
            runs[name] = place_below(root, tree("backend=unsloth", *JOB, *CHOICES[name]))
            status, shown = unsloth(runs[name])
            assert status == 0, shown + runs[name].log_tail()
        return runs[name]

    return run


def logits(folder, adapter):
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    kind = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    model = kind.from_pretrained(folder).float().eval()
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("name", CHOICES)
def test_it_trains_as_transformers_does(trained, server, place, tree, tiny_model, name):
    """From one seed the losses are within 1 %, and the saved folders load with the usual libraries and say the same."""
    run = trained(name)
    assert run.result()["status"] == "finished"
    proved = json.loads(run.effective.read_text())
    assert all(effect["ok"] for effect in proved.values())
    assert proved["backend.name"]["effective"] == "unsloth"
    assert "1 by unsloth_zoo" in proved["backend.kernels"]["how"]

    twin = place(tree("backend=transformers", "backend.kernels=stock", *JOB, *CHOICES[name]))
    assert server(twin).wait() == 0
    ours = [line for line in run.lines() if "loss" in line]
    theirs = [line for line in twin.lines() if "loss" in line]
    assert [line["step"] for line in ours] == list(range(1, 21))
    for key in ("loss", "lr", "tokens"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=0.01)
    assert ours[-1]["loss"] < 0.99 * ours[0]["loss"]
    held = [[line["eval_loss"] for line in one.lines() if "eval_loss" in line] for one in (run, twin)]
    assert len(held[0]) == 2 and held[0] == pytest.approx(held[1], rel=0.01)

    adapter = "lora=none" not in CHOICES[name]
    untrained, mine, other = (
        logits(tiny_model, False),
        logits(run.model, adapter),
        logits(twin.model, adapter),
    )
    moved = (other - untrained).abs().max()
    assert moved > 0.05 and (mine - other).abs().max() < 0.2 * moved
    files = [{path.name for path in one.model.iterdir()} for one in (run, twin)]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", CHOICES)
def test_a_stopped_run_goes_on_bit_for_bit(trained, unsloth, place, tree, unequal, name, stop_at):
    run = place(tree("backend=unsloth", *JOB, *CHOICES[name]))
    assert unsloth(run, code=stop_at(5))[0] == 130
    stopped = int(run.last_checkpoint().name.rpartition("-")[2])
    assert stopped in (5, 6)
    status, shown = unsloth(run)
    assert status == 0 and f"resuming from checkpoint-{stopped}" in shown, shown
    assert unequal(run, trained(name)) == []


def test_processes_as_soup_starts_them_stop_and_go_on(trained, place, tree, start, until, unequal):
    run = place(tree("backend=unsloth", *JOB, *CHOICES["adapters"]))
    process = start(run)
    until(process, lambda: len(run.lines()) >= 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    process = start(run)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "resuming from checkpoint-" in shown, shown
    assert unequal(run, trained("adapters")) == []


def test_unsloth_is_imported_first_and_its_environment_changes_nothing(place, tree, start, tmp_path):
    run = place(tree("backend=unsloth", "model.dtype=float32", "training.gradient_checkpointing=true"))
    process = start(
        run,
        "--prove",
        python=("-c", WATCHED),
        SEEN=str(tmp_path / "seen"),
        UNSLOTH_CPU_CHUNKED_CE="0",
        UNSLOTH_CPU_BF16="0",
        UNSLOTH_CPU_FROZEN_BF16="1",
    )
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 0, shown
    seen = json.loads((tmp_path / "seen").read_text())
    assert seen[0] == "unsloth" and set(seen[1:]) == {"transformers", "trl", "peft"}
    proved = json.loads(run.effective.read_text())
    assert [key for key, effect in proved.items() if not effect["ok"]] == []
    assert "1 by unsloth_zoo" in proved["backend.kernels"]["how"]


def test_it_does_not_come_second():
    import transformers  # noqa: F401

    from soup.device import resolve
    from soup.model import unsloth

    with pytest.raises(RuntimeError, match="transformers.* imported before unsloth"):
        unsloth.take_over(resolve("cpu"))


WITHOUT = """
import unsloth
load, adapt = unsloth.FastLanguageModel.from_pretrained, unsloth.FastLanguageModel.get_peft_model
def change(load={}, adapt={}, was_load=load, was_adapt=adapt):
    unsloth.FastLanguageModel.from_pretrained = lambda *a, **k: was_load(*a, **k | load)
    unsloth.FastLanguageModel.get_peft_model = lambda *a, **k: was_adapt(*a, **k | adapt)
"""
SABOTAGE = {
    "another loss": (
        "import unsloth_zoo.cpu.ops as ops; was = ops.chunked_linear_cross_entropy\n"
        "ops.chunked_linear_cross_entropy = lambda *a, **k: was(*a, **k) * 1.5",
        "",
        "task.name",
    ),
    "TRL's forward": (
        "from soup.model import unsloth; unsloth.arguments = lambda task: {}",
        "",
        "backend.kernels",
    ),
    "its own seed": (WITHOUT + "change(adapt={'random_state': 3407})", "", "training.seed"),
    "its own dtype": (
        WITHOUT + "import torch; change(load={'dtype': torch.bfloat16})",
        "model.dtype=float32",
        "model.dtype",
    ),
    "16 bits for 4": (
        WITHOUT + "change(load={'load_in_4bit': False})",
        "model.quantization=4bit",
        "model.quantization",
    ),
    "no DoRA": (WITHOUT + "change(adapt={'use_dora': False})", "lora=dora", "lora.use_dora"),
    "no dropout": (WITHOUT + "change(adapt={'lora_dropout': 0.0})", "lora.dropout=0.2", "lora.dropout"),
    "fewer modules": (
        WITHOUT + "change(adapt={'target_modules': ['q_proj']})",
        "",
        "lora.target_modules",
    ),
    "its own checkpointing": (
        WITHOUT + "change(adapt={'use_gradient_checkpointing': 'unsloth'})",
        "",
        "training.gradient_checkpointing",
    ),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_what_it_would_change_is_found(unsloth, place, tree, name):
    code, override, key = SABOTAGE[name]
    run = place(tree("backend=unsloth", *([override] if override else [])))
    status, shown = unsloth(run, "--prove", code=code)
    assert status == 0, shown
    proved = json.loads(run.effective.read_text())
    wrong = [one for one, effect in proved.items() if not effect["ok"]]
    assert key in wrong


def test_a_folder_that_lacks_weights_is_refused(unsloth, place, tree, tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "lacking"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    status, shown = unsloth(place(tree("backend=unsloth", f"model.base={folder}")))
    assert status == 2
    assert "has no weights for 1 of the tensors, model.layers.1.mlp.up_proj.weight" in shown


@pytest.mark.parametrize(("modules", "status"), [("[nothing]", 2), ("[q_proj,lm_head]", 1)])
def test_modules_that_it_does_not_adapt_are_refused(unsloth, place, tree, modules, status):
    """Unsloth trains a head whole where an adapter on it was asked for."""
    found, shown = unsloth(place(tree("backend=unsloth", f"lora.target_modules={modules}")))
    assert (found, "lora.target_modules" in shown) == (status, True), shown


TASKS = ("pretrain", "dpo", "ipo", "kto", "orpo", "simpo", "reward", "grpo", "ppo")
REFUSED = {f"task={task}": "task" for task in TASKS} | {
    "training.packing=true": "training.packing",
    "model.quantization=8bit": "model.quantization",
    "optim=adamw_8bit": "optim",
    "backend.kernels=stock": "backend.kernels",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_it_cannot_do_here_is_refused_with_its_reason(tree, override):
    from soup import rules, schema

    config = schema.check(tree("backend=unsloth", override))
    found = rules.facts(config, device="cpu", model_config={"model_type": "llama"})
    (problem,) = [one for one in rules.broken(found) if one.key == REFUSED[override]]
    assert "Unsloth" in problem.why and "backend=transformers" in problem.fix
    if override.startswith("task="):  # a GPU takes every task
        on_gpu = rules.broken(found | {"device": "cuda"})
        assert all("Unsloth" not in one.why for one in on_gpu)


@pytest.fixture
def hinted(monkeypatch, tmp_path, tiny_model):
    """`hinted("task=dpo")`: what soup would hint at beside that run."""
    from soup.cli import hints
    from soup.cli.check import valid
    from soup.cli.compose import drive
    from soup.cli.main import parse

    monkeypatch.setenv("SOUP_CACHE", str(tmp_path / "cache"))
    common = ("model=hub", f"model.base={tiny_model}", "data.num_proc=1", "launch.device=cpu")

    def said(*overrides):
        points = drive(parse([*common, *overrides]), lambda points: points)
        return hints.unsloth(valid(points, train=True))

    return said


def test_the_hint_is_said_once_and_imports_nothing(hinted):
    loaded = "unsloth" in sys.modules
    for used in (("backend=unsloth",), ("task=dpo",), ("model.quantization=8bit",)):
        assert hinted(*used) is None, "used already, or of no use"
    assert "backend=unsloth" in hinted()
    assert hinted() is None
    assert ("unsloth" in sys.modules) == loaded


def test_there_is_no_hint_without_unsloth(hinted, monkeypatch):
    from soup.cli import hints

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(hints, "version", missing)
    assert hinted() is None
