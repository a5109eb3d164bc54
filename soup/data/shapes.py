"""What a task needs of a row, which formats can give it, and how."""

from __future__ import annotations

from typing import Any

from soup.data.formats import COLUMNS, normalise
from soup.data.messages import Messages
from soup.data.rows import BadRow

_CHATS = ("alpaca", "sharegpt", "messages")
ACCEPTS = {
    "conversation": (*_CHATS, "prompt_completion", "text"),
    "text": ("text", *_CHATS, "prompt_completion"),
    "preference": ("preference",),
    "unpaired": ("unpaired", "preference"),
    "prompt": ("prompt", "prompt_completion", *_CHATS),
}
SHAPES = tuple(ACCEPTS)
TOKENISED = ("conversation", "text")  # one sequence a row; the other shapes have a prompt apart
ANSWERS = {"preference": ("chosen", "rejected"), "unpaired": ("completion",), "prompt": ()}
_CONVERT = {
    "conversation": "keep one answer a row as prompt and completion, or the turns as messages",
    "text": 'write each document as {"text": ...}, or as a text file',
    "preference": "give each prompt a better and a worse answer, as chosen and rejected",
    "unpaired": "give each answer a row with prompt, completion and label (true if it is good)",
    "prompt": "keep what is asked as prompt, and the reference answer in a column of its own",
}
# Columns that a conversation is made of; beside them a prompt keeps the row's columns for reward functions.
_CONSUMED = {
    "messages",
    "conversations",
    "conversation",
    "system",
    "instruction",
    "input",
    "output",
    "history",
    "completion",
}


def convert(shape: str) -> str:
    """How data of another format becomes data of `shape`."""
    accepted = "; ".join(f"{format} ({COLUMNS[format]})" for format in ACCEPTS[shape])
    return f"{_CONVERT[shape]}. Accepted: {accepted}"


def to_shape(fields: dict[str, Any], format: str, shape: str) -> list[dict[str, Any]]:
    """The examples of `shape` that a row of `format` gives: one, or two where a pair is unpaired.

    Raises BadRow; `format` must be one of ACCEPTS[shape].
    """
    example = normalise(fields, format)
    if shape == "unpaired" and format == "preference":
        return [
            {"prompt": example["prompt"], "completion": example["chosen"], "label": True},
            {"prompt": example["prompt"], "completion": example["rejected"], "label": False},
        ]
    if shape == "prompt" and format != "prompt":
        prompt, solution = _asked(example)
        others = {name: value for name, value in fields.items() if name not in _CONSUMED}
        return [{"solution": solution, **others, "prompt": prompt}]
    return [example]


def _asked(example: dict[str, Any]) -> tuple[str | Messages, str]:
    """What stands before the last assistant turn, and that turn as the reference answer."""
    if "messages" not in example:
        answer = example["completion"]
        if isinstance(answer, str):
            return example["prompt"], answer
        messages = [*example["prompt"], *answer]
    else:
        messages = example["messages"]
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    if last == 0:
        raise BadRow(
            "the conversation starts with its last assistant turn, so nothing is asked",
            "put the user's turn before it",
        )
    return messages[:last], messages[last]["content"]
