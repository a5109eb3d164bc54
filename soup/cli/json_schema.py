"""`soup schema`: the configuration as JSON Schema, with which an editor completes and checks experiment files."""

from __future__ import annotations

import json
import typing
from argparse import Namespace
from typing import Any

from soup.cli.loader import conf_dir
from soup.comments import Choice, Leaf, choices
from soup.errors import Problem, Refused
from soup.schema import GROUPS, SECTIONS, choice_function

# What Hydra puts a value in the place of, before soup reads it.
LATER = {"type": "string", "pattern": r"^(\?\?\?|.*\$\{.*)$"}


def print_schema(words: list[str], args: Namespace) -> int:  # noqa: ARG001
    """Prints the schema."""
    if words:
        raise Refused(Problem(key="schema", value=" ".join(words), why="takes no words", fix="soup schema"))
    print(json.dumps(schema(), indent=2, ensure_ascii=False))
    return 0


def schema() -> dict[str, Any]:
    """Any part of a configuration: an experiment file gives some keys, a run's config.yaml all."""
    found = {group: choices(group, conf_dir()) for group in (*SECTIONS, *GROUPS)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "soup",
        "description": "An experiment of soup (conf/experiment/*.yaml), or a run's config.yaml",
        "type": "object",
        "properties": {
            "defaults": _defaults(found),
            **{group: _group(group, listed) for group, listed in found.items()},
        },
        "additionalProperties": False,
    }


def _defaults(found: dict[str, list[Choice]]) -> dict[str, Any]:
    """The choices of groups, `- override /task: dpo`."""
    properties: dict[str, Any] = {}
    for group in GROUPS:
        names = [choice.name for choice in found[group]]
        said = "; ".join(f"{choice.name}: {choice.header}" for choice in found[group] if choice.header)
        one: dict[str, Any] = {"enum": names}
        if group == "tracking":
            one = {"anyOf": [one, {"type": "array", "items": {"enum": names}}]}
        # Names that are not among soup's own may be the user's, in a folder of --config-dir.
        properties[f"override /{group}"] = {"description": said, "anyOf": [one, {"type": "string"}]}
    entries = {"type": "object", "properties": properties}
    return {
        "type": "array",
        "description": "which choice of each group",
        "items": {"anyOf": [{"type": "string"}, entries]},
    }


def _group(group: str, listed: list[Choice]) -> dict[str, Any]:
    """All keys that any choice has: which are valid together, the choice decides when it is composed."""
    root: dict[str, Any] = _mapping()
    if group in GROUPS and group != "tracking":
        root["properties"]["name"] = {
            "enum": sorted({choice.function for choice in listed}),
            "description": "the choice's function",
        }
    by_path: dict[str, list[tuple[Choice, Leaf]]] = {}
    for choice in listed:
        for leaf in choice.leaves:
            by_path.setdefault(leaf.path, []).append((choice, leaf))
    for path, having in by_path.items():
        node = root
        *parents, name = path.split(".")
        for parent in parents:
            node = node["properties"].setdefault(parent, _mapping())
            node["properties"].setdefault("name", {"const": parent})
        node["properties"][name] = _leaf(group, path, having)
    return root


def _mapping() -> dict[str, Any]:
    return {"type": "object", "properties": {}, "additionalProperties": False}


def _leaf(group: str, path: str, having: list[tuple[Choice, Leaf]]) -> dict[str, Any]:
    types = [_type(group, path, choice) for choice, _ in having]
    unique = list({json.dumps(one, sort_keys=True): one for one in types}.values())
    comments: dict[str, list[str]] = {}
    for choice, leaf in having:
        if leaf.comment:
            comments.setdefault(leaf.comment, []).append(choice.name)
    said = next(iter(comments), "")
    if len(comments) > 1:
        said = "; ".join(f"{', '.join(names)}: {comment}" for comment, names in comments.items())
    leaf_schema: dict[str, Any] = {"description": said, "anyOf": [*unique, LATER]}
    values = {json.dumps(leaf.value) for _, leaf in having}
    if len(values) == 1 and having[0][1].value != "???":
        leaf_schema["default"] = having[0][1].value
    return leaf_schema


def _type(group: str, path: str, choice: Choice) -> dict[str, Any]:
    """The type of the function's parameter."""
    from pydantic import TypeAdapter

    function = choice_function(group, choice.function)
    if function is None:
        raise KeyError(f"{group}={choice.name} has no function")
    hint = typing.get_type_hints(function, include_extras=True)[path.rpartition(".")[2]]
    return TypeAdapter(hint).json_schema()
