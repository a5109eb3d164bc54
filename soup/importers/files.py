"""Reading another tool's file, telling whose it is, and writing the experiment that it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from soup.errors import Problem, Refused
from soup.importers.axolotl import AXOLOTL
from soup.importers.llama_factory import LLAMA_FACTORY
from soup.importers.mapping import Tool, Translated
from soup.importers.soup_cli import SOUP_CLI
from soup.importers.trl import TRL
from soup.schema import GROUPS, SECTIONS

TOOLS = {"soup-cli": SOUP_CLI, "llamafactory": LLAMA_FACTORY, "axolotl": AXOLOTL, "trl": TRL}


def read(path: Path) -> dict[str, Any]:
    """The file's keys.

    Raises:
        Refused: no such file, or no YAML that is a mapping.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise Refused(
            Problem(key="import", value=str(path), why=why, fix="a YAML file of one of the four tools")
        ) from error
    if not isinstance(found, Mapping) or not found:
        why = "holds no keys"
        raise Refused(
            Problem(key="import", value=str(path), why=why, fix="a YAML file of one of the four tools")
        )
    return {str(key): value for key, value in found.items()}


def whose(path: Path, file: Mapping[str, Any], named: str | None) -> Tool:
    """The tool that wrote the file: the one that is named, or the only one whose keys it has.

    Raises:
        Refused: nothing tells, or several could have.
    """
    if named is not None:
        return TOOLS[named]
    signs = {
        name: sorted(tool.signs & set(file)) or ([] if tool.signs else [tool.model])
        for name, tool in TOOLS.items()
        if tool.model in file
    }
    possible = [name for name, found in signs.items() if found]
    if len(possible) == 1:
        return TOOLS[possible[0]]
    shown = "; ".join(f"{', '.join(signs[name])} of {name}" for name in possible)
    why = f"has keys of several tools: {shown}" if possible else "has no key that tells which tool wrote it"
    fix = f"--from {', --from '.join(TOOLS)}"
    raise Refused(Problem(key="import", value=str(path), why=why, fix=fix))


def render(found: Translated, tool: Tool, source: str, notes: list[str]) -> str:
    """The experiment's YAML: each value with the key that it comes from, and above it what went nowhere."""
    lines = ["# @package _global_", f"# From {source} of {tool.name} ({tool.version}), by `soup import`."]
    for title, told in (
        ("Without counterpart in soup:", found.left),
        ("What soup does anyway:", found.same),
    ):
        if told:
            lines += [f"# {title}", *(f"#   {key}: {_one_line(why)}" for key, why in told.items())]
    lines += [f"# {_one_line(note)}" for note in notes]
    if found.chosen:
        lines.append("defaults:")
        order = [group for group in GROUPS if group in found.chosen]
        for group in order:
            choice, key = found.chosen[group]
            lines.append(f"  - override /{group}: {choice}  # {key}")
    for section in (*SECTIONS, *GROUPS):
        keys = {key: value for key, value in found.put.items() if key.partition(".")[0] == section}
        if keys:
            lines += ["", f"{section}:", *_nested(keys, section)]
    return "\n".join(lines) + "\n"


def _nested(keys: Mapping[str, tuple[Any, str]], section: str) -> list[str]:
    lines, opened = [], ""
    for key, (value, source) in sorted(keys.items(), key=lambda one: one[0].count(".")):
        path = key.removeprefix(f"{section}.").split(".")
        if len(path) == 2 and path[0] != opened:
            opened = path[0]
            lines.append(f"  {opened}:")
        comment = "" if source == key else f"  # {source}"
        lines.append(f"{'  ' * len(path)}{path[-1]}: {_scalar(value)}{comment}")
    return lines


def _scalar(value: Any) -> str:
    if isinstance(value, float):
        text = repr(value)  # PyYAML reads 1e-05 as text
        return text if "e" not in text or "." in text.partition("e")[0] else text.replace("e", ".0e")
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
        .strip()
        .removesuffix("\n...")
    )


def _one_line(text: str) -> str:
    return " ".join(str(text).split())
