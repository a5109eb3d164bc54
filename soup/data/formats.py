"""The formats in which people write training rows, told apart and brought to one shape each.

Shapes, where a side is a text or a list of messages and all sides of a row are the same of the two:
  alpaca, sharegpt, messages   {"messages": [{"role", "content"}, ...]}
  prompt_completion            {"prompt": side, "completion": side}
  preference                   {"prompt": side, "chosen": side, "rejected": side}
  unpaired                     {"prompt": side, "completion": side, "label": bool}
  prompt                       {"prompt": side, and every other column as it is}
  text                         {"text": str}
"""

from __future__ import annotations

from typing import Any

from soup.data.messages import Messages, alike, answered, side, text, turns, with_system
from soup.data.rows import BadRow, describe, names

COLUMNS = {
    "alpaca": "instruction and output, with optional input, history and system",
    "sharegpt": "conversations, a list of from/value, with optional system",
    "messages": "messages, a list of role/content",
    "prompt_completion": "prompt and completion",
    "preference": "chosen and rejected, with prompt or conversations, or both whole conversations",
    "unpaired": "prompt, completion and label (true or false)",
    "prompt": "prompt, and what the reward functions read",
    "text": "text",
}
FORMATS = tuple(COLUMNS)
_CONVERSATIONS = ("messages", "conversations", "conversation")


def detect(fields: dict[str, Any]) -> str | None:
    """The format that a row's columns say, null ones left aside; None where they say none."""
    has = {name for name, value in fields.items() if value is not None}
    if {"chosen", "rejected"} <= has:
        return "preference"
    if {"prompt", "completion"} <= has:
        return "unpaired" if "label" in has else "prompt_completion"
    for name in _CONVERSATIONS:
        if name in has:
            value = fields[name]
            first = value[0] if isinstance(value, list) and value else None
            if isinstance(first, dict) and ("from" in first or "role" in first):
                return "sharegpt" if first.get("from") is not None else "messages"
            return "messages" if name == "messages" else "sharegpt"
    if {"instruction", "output"} <= has:
        return "alpaca"
    return next((name for name in ("prompt", "text") if name in has), None)


def normalise(fields: dict[str, Any], format: str) -> dict[str, Any]:
    """A row of `format` in its shape (see above). Raises BadRow where it is not of that format."""
    tools = fields.get("tools")
    if tools not in (None, "", "[]", []) and format != "prompt":
        raise BadRow("`tools` is not supported", "write the tools into a system turn, without the column")
    if format not in _NORMALISE:
        raise ValueError(f"no such format: {format}")
    try:
        return _NORMALISE[format](fields)
    except _Missing as missing:
        seen = detect(fields)
        if seen is not None and seen != format:
            raise BadRow(
                f"the row is of format {seen}; {format} is needed, which has {COLUMNS[format]}",
                f"rename its columns, or use data.format={seen} for data that is {seen} throughout",
            ) from None
        raise BadRow(
            f"`{missing.name}` is missing (columns here: {names(fields)}); {format} needs {COLUMNS[format]}",
            f"add or rename the column `{missing.name}`",
        ) from None


class _Missing(Exception):
    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


def _get(fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise _Missing(name)
    return fields[name]


def _conversation(fields: dict[str, Any]) -> tuple[str, Any]:
    for name in _CONVERSATIONS:
        if fields.get(name) is not None:
            return name, fields[name]
    raise _Missing("messages")


def _question(fields: dict[str, Any]) -> str:
    """Alpaca's instruction, and its input on the next line where there is one."""
    instruction = text(_get(fields, "instruction"), "instruction")
    extra = fields.get("input")
    return instruction if extra is None or extra == "" else f"{instruction}\n{text(extra, 'input')}"


def _alpaca(fields: dict[str, Any]) -> dict[str, Any]:
    question, answer = _question(fields), text(_get(fields, "output"), "output")
    history = fields.get("history")
    if history is None or history == "":
        history = []
    if not isinstance(history, list):
        raise BadRow(f"`history` is {describe(history)}, not a list", "write it as [[question, answer], ...]")
    pairs = []
    for index, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(
                f"`history[{index}]` is {describe(pair)}, not [question, answer]",
                "write it as [[question, answer], ...]",
            )
        pairs.append((text(pair[0], f"history[{index}][0]"), text(pair[1], f"history[{index}][1]")))
    messages = []
    for asked, said in [*pairs, (question, answer)]:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"messages": with_system(messages, fields.get("system"))}


def _sharegpt(fields: dict[str, Any]) -> dict[str, Any]:
    name, value = _conversation(fields)
    return {"messages": with_system(answered(turns(value, name, "sharegpt"), name), fields.get("system"))}


def _messages(fields: dict[str, Any]) -> dict[str, Any]:
    name, value = _conversation(fields)
    return {"messages": with_system(answered(turns(value, name, "messages"), name), fields.get("system"))}


def _prompt(fields: dict[str, Any]) -> str | Messages:
    """What is asked, from `prompt`, `conversations` (sharegpt style) or `instruction` (alpaca style)."""
    if fields.get("prompt") is not None:
        prompt = side(fields["prompt"], "prompt")
    elif "prompt" not in fields and any(fields.get(name) is not None for name in _CONVERSATIONS):
        name, value = _conversation(fields)
        prompt = turns(value, name)
    elif "prompt" not in fields and fields.get("instruction") is not None:
        prompt = [{"role": "user", "content": _question(fields)}]
    else:
        prompt = side(_get(fields, "prompt"), "prompt")
    system = fields.get("system")
    if isinstance(prompt, str):
        return (
            prompt
            if system is None or system == ""
            else with_system([{"role": "user", "content": prompt}], system)
        )
    return with_system(prompt, system)


def _prompt_completion(fields: dict[str, Any]) -> dict[str, Any]:
    prompt, completion = alike(_prompt(fields), side(_get(fields, "completion"), "completion"))
    _check_answer(completion, "completion")
    return {"prompt": prompt, "completion": completion}


def _preference(fields: dict[str, Any]) -> dict[str, Any]:
    chosen = side(_get(fields, "chosen"), "chosen")
    rejected = side(_get(fields, "rejected"), "rejected")
    if chosen == rejected:
        raise BadRow("`chosen` and `rejected` are the same, so nothing is preferred", "leave the row out")
    asked = any(fields.get(name) is not None for name in ("prompt", "instruction", *_CONVERSATIONS))
    if _is_whole(chosen) and _is_whole(rejected):
        # Whole conversations carry the prompt themselves; a `prompt` beside them repeats a part of it.
        return _split(with_system(chosen, fields.get("system")), with_system(rejected, fields.get("system")))
    if not asked and isinstance(chosen, str) and isinstance(rejected, str):
        return _split_text(chosen, rejected)
    prompt, chosen, rejected = alike(_prompt(fields), chosen, rejected)
    _check_answer(chosen, "chosen")
    _check_answer(rejected, "rejected")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _is_whole(value: str | Messages) -> bool:
    return not isinstance(value, str) and value[0]["role"] != "assistant"


def _split(chosen: Messages, rejected: Messages) -> dict[str, Any]:
    """Two conversations as the prompt they share, up to an assistant turn of both, and the two answers."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared > 0 and not all(
        len(one) > shared and one[shared]["role"] == "assistant" for one in (chosen, rejected)
    ):
        shared -= 1
    if shared == 0:
        raise BadRow(
            "`chosen` and `rejected` share no prompt that an assistant answers in both",
            "give both the same turns before the answers, or give the prompt as `prompt`",
        )
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _split_text(chosen: str, rejected: str) -> dict[str, Any]:
    """The same of two texts, as trl.extract_prompt does it: a space before the answers is theirs."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    at = next((index for index, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    at -= chosen[at - 1 : at] == " "
    parts = {"prompt": chosen[:at], "chosen": chosen[at:], "rejected": rejected[at:]}
    for name, part in parts.items():
        if not part.strip():
            raise BadRow(
                f"no `prompt`, and `chosen` and `rejected` share none: {name} would be empty",
                "give the prompt as `prompt`",
            )
    return parts


def _check_answer(answer: str | Messages, name: str) -> None:
    if not isinstance(answer, str) and answer[0]["role"] != "assistant":
        raise BadRow(
            f"`{name}` starts with a turn of {answer[0]['role']}, not of the assistant",
            "keep only the answer there, and put the turns before it into the prompt",
        )


_LABELS = {"true": True, "1": True, "false": False, "0": False}


def _unpaired(fields: dict[str, Any]) -> dict[str, Any]:
    value = _get(fields, "label")
    label = value.strip().lower() if isinstance(value, str) else value
    if isinstance(label, str):
        label = _LABELS.get(label)
    elif isinstance(label, bool | int | float) and label in (0, 1):
        label = bool(label)
    if not isinstance(label, bool):
        shown = repr(value[:40]) if isinstance(value, str) else describe(value)
        raise BadRow(f"`label` is {shown}", "use true or false, or 1 or 0")
    return {**_prompt_completion(fields), "label": label}


def _prompt_only(fields: dict[str, Any]) -> dict[str, Any]:
    _get(fields, "prompt")
    prompt = _prompt(fields)
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise BadRow(
            "`prompt` ends with an assistant turn, so there is nothing to answer",
            "end it with the user's turn, and keep the answer in a column of its own",
        )
    return {**fields, "prompt": prompt}


def _text(fields: dict[str, Any]) -> dict[str, Any]:
    return {"text": text(_get(fields, "text"), "text")}


_NORMALISE = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "preference": _preference,
    "unpaired": _unpaired,
    "prompt": _prompt_only,
    "text": _text,
}
