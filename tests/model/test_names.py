"""Modules that an adapter is to be placed on are looked up in the model's files."""

import json

import pytest

from soup.model.names import untargeted
from soup.schema import check


def found(tree, model, *words):
    config = check(tree(f"model.base={model}", *words))
    return untargeted(config, model, json.loads((model / "config.json").read_text()))


@pytest.mark.parametrize(
    "word", ["all-linear", "down_proj", "[q_proj,layers.0.mlp.up_proj]", "[embed_tokens]"]
)
def test_modules_that_are_there(tree, tiny_model, word):
    assert found(tree, tiny_model, f"lora.target_modules={word}") is None


def test_a_module_that_is_not(tree, tiny_model):
    problem = found(tree, tiny_model, "lora.target_modules=[q_proj,c_attn]")
    assert problem.why == "this model has no module c_attn"
    assert "q_proj" in problem.fix and "norm" not in problem.fix


def test_all_weights_have_no_targets(tree, tiny_model):
    assert found(tree, tiny_model, "lora=none") is None
