"""The signature of a choice's function is its schema: what it takes, what it refuses, and what it says then."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml

from soup import schema, specs
from soup.errors import Refused
from soup.schema import GROUPS, SECTIONS

CONF = Path(__file__).parents[1] / "conf"
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]


def read(group, choice):
    return yaml.safe_load((CONF / group / f"{choice}.yaml").read_text()) or {}


def sections():
    whole = yaml.safe_load((CONF / "config.yaml").read_text())
    return {section: whole[section] for section in SECTIONS}


@pytest.fixture
def tree():
    """The default configuration, without Hydra."""
    defaults = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    chosen = {k: v for one in defaults if isinstance(one, dict) for k, v in one.items() if k in GROUPS}
    assert set(chosen) == set(GROUPS)
    return {group: read(group, choice) for group, choice in chosen.items()} | sections()


@pytest.fixture
def problems(tree):
    """The problems of the default configuration with some leaves replaced: `problems({"lora.r": 0})`."""

    def found(replaced):
        for key, value in replaced.items():
            *parents, leaf = key.split(".")
            node = tree
            for parent in parents:
                node = node[parent]
            if value is DELETED:
                del node[leaf]
            else:
                node[leaf] = value
        with pytest.raises(Refused) as refused:
            schema.check(tree)
        assert all(problem.why and problem.fix for problem in refused.value.problems)
        return {problem.key: problem for problem in refused.value.problems}

    return found


DELETED = object()


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids="=".join)
def test_every_yaml_is_what_its_function_takes(group, choice, tree):
    node = read(group, choice)
    nodes = node.values() if group == "tracking" else [node]
    for one in nodes:
        function = schema.choice_function(group, one["name"])
        assert function is not None, f"{group} has no function {one['name']}"
        parameters = inspect.signature(function).parameters
        assert set(one) - {"name"} == set(parameters), "each key has a parameter, and each parameter a key"
        for parameter in parameters.values():
            assert parameter.kind is parameter.KEYWORD_ONLY
            assert parameter.default is parameter.empty, "defaults are the YAML's"
    if node.get("base") == "???":
        node["base"] = "someone/model"
    config = schema.check(tree | {group: node})
    assert config.tree[group] == node


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_is_what_its_function_takes(section):
    parameters = inspect.signature(schema.choice_function(section, section)).parameters
    assert set(sections()[section]) == set(parameters)


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "model"])
def test_every_function_has_a_yaml(group):
    import importlib

    module = importlib.import_module(f"soup.choices.{group}")
    functions = {
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    }
    named = set()
    for one, choice in CHOICES:
        if one == group:
            node = read(group, choice)
            named |= {child["name"] for child in node.values()} if group == "tracking" else {node["name"]}
    assert named == functions


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids="=".join)
def test_every_knob_is_commented(group, choice):
    text = (CONF / group / f"{choice}.yaml").read_text()
    assert text.startswith("#"), "a line that says what the choice is"


def test_specs_are_frozen_data(tree):
    import dataclasses

    config = schema.check(tree)
    for spec in config.specs():
        assert isinstance(spec, specs.Spec)
        with pytest.raises(dataclasses.FrozenInstanceError):
            spec.args = {}


REFUSED = {
    "wrong type: text for a number": ({"lora.r": "sixteen"}, "lora.r", "must be a valid integer"),
    "text that looks like a number": ({"lora.r": "16"}, "lora.r", "must be a valid integer"),
    "a fraction for a whole number": (
        {"training.batch_size": 1.5},
        "training.batch_size",
        "must be a valid integer",
    ),
    "a number for a switch": ({"training.packing": 1}, "training.packing", "must be a valid boolean"),
    "text for a switch": ({"training.packing": "yes"}, "training.packing", "must be a valid boolean"),
    "a switch for a number": ({"lora.r": True}, "lora.r", "must be a valid integer"),
    "a number for text": ({"run.root": 5}, "run.root", "must be a valid string"),
    "a list for a number": ({"optim.lr": [1e-3]}, "optim.lr", "must be a valid number"),
    "too small": ({"lora.r": 0}, "lora.r", "must be greater than or equal to 1"),
    "negative": ({"optim.weight_decay": -0.1}, "optim.weight_decay", "must be greater than or equal to 0"),
    "at an open bound": ({"optim.lr": 0.0}, "optim.lr", "must be greater than 0"),
    "too large": ({"lora.dropout": 1.0}, "lora.dropout", "must be less than 1"),
    "a seed beyond 32 bits": ({"training.seed": 2**32}, "training.seed", "must be less than or equal to"),
    "infinite": ({"optim.lr": float("inf")}, "optim.lr", "finite"),
    "not a number": ({"optim.lr": float("nan")}, "optim.lr", "finite"),
    "empty text": ({"run.root": ""}, "run.root", "must not be empty"),
    "an empty list": ({"lora.target_modules": []}, "lora.target_modules", "must not be empty"),
    "a list with empty text": (
        {"lora.target_modules": ["q_proj", ""]},
        "lora.target_modules",
        "must not be empty",
    ),
    "null": ({"lora.r": None}, "lora.r", "must be a valid integer"),
    "null for text": ({"data.format": None}, "data.format", "must be 'auto'"),
    "none of the words": (
        {"optim.scheduler": "cosign"},
        "optim.scheduler",
        "'cosine', 'linear' or 'constant'",
    ),
    "missing": ({"lora.alpha": DELETED}, "lora.alpha", "is missing"),
    "missing in a section": ({"training.seed": DELETED}, "training.seed", "is missing"),
    "unknown": ({"lora.rank_of_it": 8}, "lora.rank_of_it", "is not a key of lora"),
    "unknown in a section": ({"training.batchsize": 8}, "training.batchsize", "is not a key of training"),
    "a missing group": ({"lora": DELETED}, "lora", "is not a group of keys"),
    "a group that is a word": ({"lora": "lora"}, "lora", "is not a group of keys"),
    "an unknown group": ({"loar": {}}, "loar", "is not a key"),
    "an unknown function": ({"lora.name": "qlora"}, "lora.name", "is no such function"),
    "a name that is no text": ({"lora.name": 3}, "lora.name", "is no such function"),
    "a private function": ({"model.name": "_quantizer"}, "model.name", "is no such function"),
    "a tracker that is a word": ({"tracking": {"wandb": "on"}}, "tracking.wandb", "is not a group of keys"),
    "an unknown tracker": ({"tracking": {"x": {"name": "x"}}}, "tracking.x.name", "is no such function"),
}


@pytest.mark.parametrize(("replaced", "key", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(problems, replaced, key, why):
    found = problems(replaced)
    assert list(found) == [key]
    assert why in found[key].why
    assert str(found[key]).startswith(key)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("lora.alhpa", "lora.alpha"),
        ("training.batchsize", "training.batch_size"),
        ("training.max_step", "training.max_steps"),
        ("optim.weightdecay", "optim.weight_decay"),
        ("data.maxlength", "data.max_length"),
        ("trainings", "training"),
    ],
)
def test_the_nearest_known_key_is_suggested(problems, wrong, meant):
    assert problems({wrong: 1})[wrong].fix == f"did you mean {meant}?"


def test_a_fix_is_a_value_that_would_do(problems):
    found = problems({"lora.r": 0, "optim.scheduler": "x", "training.packing": 3})
    assert found["lora.r"].fix == "lora.r=1"
    assert found["optim.scheduler"].fix == "optim.scheduler=cosine"
    assert found["training.packing"].fix == "training.packing=true"


def test_all_problems_are_reported_together(problems):
    found = problems(
        {
            "lora.r": 0,
            "lora.alhpa": 1,
            "lora.dropout": DELETED,
            "optim.lr": float("nan"),
            "training.seed": -1,
            "training.packing": None,
            "run.root": "",
            "extra": {},
            "data": "rows.jsonl",
        }
    )
    keys = {"lora.r", "lora.alhpa", "lora.dropout", "optim.lr", "training.seed", "training.packing"}
    assert set(found) == keys | {"run.root", "extra", "data"}


def test_two_choices_that_set_one_argument(tree):
    import dataclasses

    config = schema.check(tree)
    task = dataclasses.replace(config.task, args={**config.task.args, "weight_decay": 0.5})
    with pytest.raises(Refused) as refused:
        schema.merge_arguments(dataclasses.replace(config, task=task))
    assert "weight_decay" in str(refused.value)
    assert "task" in str(refused.value) and "optim" in str(refused.value), "both are named"
    same = dataclasses.replace(config.task, args={**config.task.args, "weight_decay": 0.0})
    assert schema.merge_arguments(dataclasses.replace(config, task=same))["weight_decay"] == (0.0, "task")


@pytest.mark.parametrize("choice", [choice for group, choice in CHOICES if group == "task"])
def test_every_argument_exists_in_trls_class(choice, tree):
    """A task's arguments, and those of every optimizer and of the training section, which all tasks share."""
    import dataclasses

    from soup.train.build import _load

    config = schema.check(tree | {"task": read("task", choice)})
    known = {field.name for field in dataclasses.fields(_load(config.task.config)) if field.init}
    given = set(schema.merge_arguments(config))
    for group, optimizer in CHOICES:
        if group == "optim":
            given |= set(schema.check(tree | {"optim": read(group, optimizer)}).optim.args)
    if config.task.max_length is not None:
        given.add(config.task.max_length)
    assert given - known == set()
    assert isinstance(_load(config.task.trainer), type)
