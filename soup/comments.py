"""What conf/ says of its own keys: each with its value, and the comment beside it or above it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from soup.schema import SECTIONS


@dataclass(frozen=True)
class Leaf:
    """One key in one YAML: its path in the group, its value and its comment."""

    path: str
    value: Any
    comment: str


@dataclass(frozen=True)
class Choice:
    """One YAML of a group, and the function behind it."""

    name: str
    function: str
    header: str
    leaves: tuple[Leaf, ...]


def choices(group: str, conf: Path) -> list[Choice]:
    """The choices of a group, the section as its only one."""
    if group in SECTIONS:
        text = (conf / "config.yaml").read_text()
        return [Choice(group, group, "", tuple(_leaves(text, _node(text, group))))]
    found = []
    for path in sorted((conf / group).glob("*.yaml")):
        text = path.read_text()
        leaves = [leaf for leaf in _leaves(text, _root(text))]
        names = {leaf.path.rpartition(".")[2]: leaf.value for leaf in leaves if leaf.path.endswith("name")}
        kept = tuple(leaf for leaf in leaves if leaf.path.rpartition(".")[2] != "name")
        found.append(Choice(path.stem, names.get("name", path.stem), header(text), kept))
    return found


def header(text: str) -> str:
    """The comment at the top of a YAML, in one line; its `@package` left out."""
    start = _root(text).start_mark.index
    lines = [line.lstrip("# ") for line in text[:start].splitlines()]
    return " ".join(line for line in lines if not line.startswith("@package"))


def _node(text: str, section: str) -> yaml.MappingNode:
    return next(value for key, value in _root(text).value if key.value == section)


def _root(text: str) -> yaml.MappingNode:
    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("not a mapping")
    return root


def _leaves(text: str, node: yaml.MappingNode, prefix: str = "") -> Iterator[Leaf]:
    """The leaves of a mapping. A comment stands after the value, or above the key."""
    lines = text.splitlines()
    for key, value in node.value:
        path = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _leaves(text, value, f"{path}.")
            continue
        above: list[str] = []
        for line in reversed(lines[: key.start_mark.line]):
            if not line.strip().startswith("#"):
                break
            above.insert(0, line.strip().lstrip("# "))
        after = lines[value.end_mark.line][value.end_mark.column :].strip()
        comment = " ".join([*above, after.lstrip("# ")]).strip()
        loaded = yaml.safe_load(text[value.start_mark.index : value.end_mark.index])
        yield Leaf(path, loaded, comment)
