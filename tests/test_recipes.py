"""conf/experiment: each recipe composes and plans on a machine that has neither its model nor a hub."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from soup.cli.check import checked
from soup.cli.compose import drive
from soup.cli.main import main, parse
from soup.errors import Refused
from soup.model import source
from soup.schema import check

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml"))
# Parameters as the hub's model pages count them, and those of adapters of rank 16 on all linear layers.
LARGE = {
    "llama3_8b_qlora_sft": (8_030_261_248, 41_943_040),
    "mistral_7b_dpo": (7_248_023_552, 41_943_040),
    "qwen2_5_7b_grpo_maths": (7_615_616_512, 40_370_176),
}
GIVEN = {"ppo": ("task.reward_model=outputs/ID/model",)}
CARD = 24e9  # bytes of a 24 GB GPU


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """An empty folder, an empty cache of the hub's library, and no hub (tests/conftest.py)."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def plan(capsys):
    def planned(*overrides):
        capsys.readouterr()
        status = main(["plan", *overrides, "--json"])
        shown = capsys.readouterr()
        assert status == 0, shown.err
        return json.loads(shown.out)

    return planned


def test_there_are_recipes():
    assert set(RECIPES) >= {"quickstart", *LARGE}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_composes(recipe, compose):
    config = check(compose(f"experiment={recipe}"))
    assert config.run.name == recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_plans(recipe, plan):
    found = plan(f"experiment={recipe}", *GIVEN.get(recipe, ()))
    assert found["steps"] > 0
    assert sum(found["memory"].values()) == found["peak_memory_bytes"]
    assert ("lengths" in found["notes"]) == (recipe in LARGE)


@pytest.mark.parametrize("recipe", LARGE)
def test_the_parameters_are_those_of_the_public_model(recipe, plan):
    found = plan(f"experiment={recipe}")
    assert (found["parameters"], found["trainable"]) == LARGE[recipe]


@pytest.mark.parametrize("recipe", LARGE)
def test_a_carried_config_is_one_that_transformers_builds_that_model_from(recipe, compose):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = check(compose(f"experiment={recipe}")).model
    read = dict(source.described(model, weights=False).config)
    config = AutoConfig.for_model(read.pop("model_type"), **read)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in built.parameters()) == LARGE[recipe][0]
    assert config.architectures == [type(built).__name__]
    assert config.dtype == torch.bfloat16
    assert config.rope_parameters["rope_type"] == ("llama3" if "llama" in recipe else "default")


@pytest.mark.parametrize("recipe", LARGE)
def test_a_large_recipe_is_pinned_and_for_a_gpu(recipe, compose):
    tree = compose(f"experiment={recipe}")
    assert re.fullmatch("[0-9a-f]{40}", tree["model"]["revision"])
    assert tree["launch"]["device"] == "cuda"
    assert tree["training"]["gradient_checkpointing"] is True
    assert tree["data"]["train"] is None


@pytest.mark.parametrize("recipe", LARGE)
def test_a_plan_says_what_stands_in_for_the_model(recipe, capsys):
    assert main(["plan", f"experiment={recipe}"]) == 0
    one = " ".join(capsys.readouterr().out.split())
    assert main(["plan", "--multirun", f"experiment={recipe}", "lora.r=8,16"]) == 0
    several = " ".join(capsys.readouterr().out.split())
    for shown in (one, several):
        assert shown.count("embedded model's tokenizer") == 1
        assert shown.count("config.json that soup") == 1


def test_a_model_that_is_there_needs_no_note(capsys):
    assert main(["plan", "experiment=quickstart"]) == 0
    assert "embedded model's tokenizer" not in capsys.readouterr().out


def test_qlora_of_8b_fits_a_24_gb_gpu_and_training_all_its_weights_does_not(plan, tmp_path):
    words = " ".join(["lighthouse"] * 4000)  # truncated: every row is as long as the recipe allows
    rows = [{"prompt": f"{number}: tell me more", "completion": words} for number in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = ["experiment=llama3_8b_qlora_sft", "data.train=rows.jsonl"]
    qlora = plan(*recipe)
    assert plan("experiment=llama3_8b_qlora_sft")["peak_memory_bytes"] < qlora["peak_memory_bytes"] < CARD
    assert qlora["tokens_per_step"] == 16 * 2048
    assert qlora["memory"]["weights"] < plan(*recipe, "model.quantization=none")["memory"]["weights"] / 2
    full = plan(
        "model=hub",
        "model.base=meta-llama/Llama-3.1-8B-Instruct",
        "model.dtype=bfloat16",
        "lora=none",
        "training.batch_size=1",
        "training.gradient_checkpointing=true",
        "data.max_length=128",
        "launch.device=cuda",
    )
    assert full["trainable"] == full["parameters"]
    assert full["peak_memory_bytes"] > CARD
    assert full["memory"]["gradients"] > 16e9  # two bytes for each weight at the least


def test_nothing_that_stands_in_is_trained():
    """On a CPU and for SFT, so that nothing but the model is missing."""
    words = ["model=hub", "model.base=Qwen/Qwen2.5-7B-Instruct", "launch.device=cpu"]
    (planned,) = drive(parse(words), lambda points: checked(points, train=False))
    assert planned.plan.parameters == LARGE["qwen2_5_7b_grpo_maths"][0]
    (refused,) = drive(parse(words), lambda points: checked(points, train=True))
    assert isinstance(refused, Refused)
    (problem,) = refused.problems
    assert (problem.key, problem.value) == ("model.base", "Qwen/Qwen2.5-7B-Instruct")


def test_an_unreachable_hub_is_no_traceback_and_planning_needs_no_torch(tmp_path):
    """The hub's library raises other errors where it is not told to be offline; port 9 answers nobody."""
    code = (
        "import sys; from soup.cli.main import main; status = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(status)"
    )
    line = [sys.executable, "-c", code, "plan", "experiment=llama3_8b_qlora_sft", "--json"]
    unreachable = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "hf"),
    }
    done = subprocess.run(line, cwd=ROOT, env=os.environ | unreachable, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parameters"] == LARGE["llama3_8b_qlora_sft"][0]
    assert "the hub gave none" in found["notes"]["model"]
