"""`soup schema` and `soup recipes`."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from soup.cli.json_schema import schema
from soup.schema import GROUPS, SECTIONS

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "conf/experiment").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator():
    found = schema()
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


def test_it_is_printed(shell):
    assert json.loads(shell.run("schema").out) == json.loads(json.dumps(schema()))
    assert shell.run("schema", "lora").status == 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(path, validator):
    validator.validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    "overrides",
    ["", "task=grpo optim=galore lora=none", "tracking=[wandb,mlflow]", "launch=slurm longctx=longrope"],
)
def test_a_runs_configuration_is_valid(overrides, compose, validator):
    validator.validate(compose(*overrides.split()))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("lora: {rr: 8}", ["lora"]),
        ("lora: {r: 0}", ["lora", "r"]),
        ("lora: {r: eight}", ["lora", "r"]),
        ("training: {use_flash_attn: v4}", ["training", "use_flash_attn"]),
        ("optim: {lr: -1.0}", ["optim", "lr"]),
        ("trainning: {}", []),
        ("tracking: {wandb: {projekt: x}}", ["tracking", "wandb"]),
        ("data: {train: 3}", ["data", "train"]),
    ],
)
def test_mistakes_are_not(text, where, validator):
    (error,) = validator.iter_errors(yaml.safe_load(text))
    assert list(error.absolute_path) == where


@pytest.mark.parametrize(
    "text", ["lora: {r: '${lora.alpha}'}", "model: {base: '???'}", "data: {train: [a, b]}"]
)
def test_what_hydra_puts_in_is_valid(text, validator):
    validator.validate(yaml.safe_load(text))


def test_every_key_has_a_description():
    def leaves(node, path=""):
        for name, one in node.get("properties", {}).items():
            if "properties" in one:
                yield from leaves(one, f"{path}{name}.")
            elif name != "name":
                yield f"{path}{name}", one

    found = schema()
    for group in (*SECTIONS, *GROUPS):
        for key, one in leaves(found["properties"][group], f"{group}."):
            assert one["description"], key


def test_recipes(shell, tmp_path):
    shown = shell.run("recipes").out
    assert all(path.stem in shown for path in RECIPES)
    (one,) = json.loads(shell.run("recipes", "grpo", "MATHS", "--json").out)
    assert (one["name"], one["task"], one["model"]) == (
        "qwen2_5_7b_grpo_maths", "grpo", "Qwen/Qwen2.5-7B-Instruct",
    )  # fmt: skip
    (tmp_path / "own/experiment").mkdir(parents=True)
    (tmp_path / "own/experiment/mine.yaml").write_text("# @package _global_\n# About lamps.\nlora: {r: 1}\n")
    assert "mine" in shell.run("recipes", "lamps", "--config-dir", str(tmp_path / "own")).out
    assert "no recipe has nothing-like-it" in shell.run("recipes", "nothing-like-it").out
