"""Which rows axolotl's files name: what soup reads as it stands, and what of a source it would read otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from soup.importers.mapping import Choose, File, Leave, Outcome, Put, Same, at, sources

FORMATS = {
    "alpaca": "alpaca", "completion": "text", "pretrain": "text", "chat_template": "auto", "sharegpt": "sharegpt",
    "chat_template.default": "auto", "chat_template.argilla": "preference",
}  # fmt: skip
PART = "soup reads a source as it is: write the part, or the columns under their usual names, to a file"
USUAL = (("messages", "role", "content"), ("conversations", "from", "value"))  # messages, sharegpt
COLUMNS = ("field_messages", "message_property_mappings", "message_field_role", "message_field_content")


def datasets(value: Any, _: File) -> list[Outcome]:
    found: list[Outcome] = [sources([str(one["path"]) for one in value])]
    types = [one.get("type") for one in value]
    formats = {FORMATS.get(one) if isinstance(one, str) else None for one in types if one is not None}
    why = []
    if len(formats) == 1 and None not in formats:
        (name,) = formats
        found.append(Put("data.format", name))
    elif formats:
        shown = ", ".join(dict.fromkeys(str(one) if isinstance(one, str) else "a mapping" for one in types))
        why.append(f"type {shown}: data.format=auto recognises each source from its rows")
    if any(str(one).partition(":")[0] == "alpaca" for one in types):
        why.append(
            "alpaca rows are rendered with the tokenizer's chat template, without Alpaca's own words around them"
        )
    if beside := _beside(value):
        why.append(f"{PART} ({', '.join(beside)})")
    return [*found, Leave("; ".join(why))] if why else found


def _beside(sources_: list[Mapping[str, Any]], split: str = "train") -> list[str]:
    """What sources say that soup does not read; which columns there are says nothing where they are the usual ones."""
    found: set[str] = set()
    for one in sources_:
        said = {key: value for key, value in one.items() if value is not None and key not in ("path", "type")}
        mapping = said.get("message_property_mappings", {})
        names = (
            said.get("field_messages", "messages"),
            said.get("message_field_role", mapping.get("role", "role")),
            said.get("message_field_content", mapping.get("content", "content")),
        )
        if names in USUAL and set(mapping) <= {"role", "content"}:
            said = {key: value for key, value in said.items() if key not in COLUMNS}
        usual = {"split": split, "field": "text"}
        found |= {key for key, value in said.items() if usual.get(key) != value}
    return sorted(found)


def held_out_files(value: Any, _: File) -> list[Outcome]:
    files = [str(one["path"]) for one in value]
    found: list[Outcome] = [Put("data.eval", files[0] if len(files) == 1 else files)]
    if beside := _beside(value, split="test"):
        found.append(Leave(f"{PART} ({', '.join(beside)})"))
    return found


def pretraining(value: Any, _: File) -> list[Outcome]:
    listed = value if isinstance(value, list) else [value]
    paths = [str(one["path"]) if isinstance(one, Mapping) else str(one) for one in listed]
    found: list[Outcome] = [Choose("task", "pretrain"), sources(paths), Put("data.streaming", True)]
    if beside := _beside([one for one in listed if isinstance(one, Mapping)]):
        found.append(Leave(f"{PART} ({', '.join(beside)})"))
    return found


def held_out_share(value: Any, file: File) -> list[Outcome]:
    if float(value) >= 1:
        return [Leave("soup holds out a share, not a number of rows: data.eval_fraction")]
    if at(file, "test_datasets"):
        return [Same("test_datasets names the held-out rows")]
    return [Put("data.eval_fraction", float(value))]
