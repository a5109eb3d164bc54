"""Conversations and texts as rows write them, turned into messages of `role` and `content`."""

from __future__ import annotations

from typing import Any, Literal

from soup.data.rows import BadRow, describe

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
# What these say would change what is rendered or learnt, so a row that uses one is not taken without it.
_UNREAD = ("tool_calls", "function_call", "reasoning_content", "thinking", "weight")

Messages = list[dict[str, str]]


def text(value: Any, name: str) -> str:
    """`value`, if it is a text with something in it; else BadRow, which calls it `name`."""
    if not isinstance(value, str):
        fix = f"give `{name}` a text" if value is None else f"write `{name}` as a text, in quotes"
        raise BadRow(f"`{name}` is {describe(value)}, not a text", fix)
    if not value or value.isspace():
        raise BadRow(f"`{name}` is empty", f"give `{name}` a text, or leave the row out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"`{name}` has half a surrogate pair at character {error.start + 1}, which is no text",
            "write the character whole",
        ) from error
    return value


def turns(value: Any, name: str, style: Literal["messages", "sharegpt"] | None = None) -> Messages:
    """A list of turns, `role`/`content` or `from`/`value`, as messages; `style` allows one of the two."""
    if not isinstance(value, list):
        raise BadRow(
            f"`{name}` is {describe(value)}, not a list of turns",
            'write it as [{"role": "user", "content": "..."}, ...]',
        )
    if not value:
        raise BadRow(f"`{name}` has no turns", "give it turns, or leave the row out")
    return [_turn(turn, f"{name}[{index}]", style) for index, turn in enumerate(value)]


def _turn(turn: Any, name: str, style: str | None) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise BadRow(f"`{name}` is {describe(turn)}, not a turn", 'write it as {"role": ..., "content": ...}')
    is_sharegpt = turn.get("from") is not None
    if is_sharegpt and style == "messages":
        raise BadRow(
            f"`{name}` has from/value where role/content is needed",
            "use data.format=sharegpt, or rename from (human: user, gpt: assistant) and value",
        )
    if style == "sharegpt" and not is_sharegpt:
        raise BadRow(
            f"`{name}` is {describe(turn)}; from/value is needed",
            "use data.format=messages, or rename role to from and content to value",
        )
    for key in _UNREAD:
        if turn.get(key) not in (None, [], {}, "", 1):
            raise BadRow(
                f"`{name}.{key}` is not supported", f"write what it says into the turn's text, without {key}"
            )
    role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    role = text(turn.get(role_key), f"{name}.{role_key}")
    known = SHAREGPT_ROLES if is_sharegpt else {role: role for role in ROLES}
    if role not in known:
        raise BadRow(
            f"`{name}.{role_key}` is {role[:40]!r}, which is no role", f"use one of {', '.join(known)}"
        )
    content = turn.get(content_key)
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    elif isinstance(content, list):
        raise BadRow(
            f"`{name}.{content_key}` is a list with parts that are not text", "keep the text parts only"
        )
    return {"role": known[role], "content": text(content, f"{name}.{content_key}")}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def with_system(messages: Messages, system: Any) -> Messages:
    """`messages` after the row's `system` text, if it has one."""
    if system is None or system == "":
        return messages
    if messages[0]["role"] == "system":
        raise BadRow("there are two system prompts, `system` and the first turn", "keep one of them")
    return [{"role": "system", "content": text(system, "system")}, *messages]


def answered(messages: Messages, name: str) -> Messages:
    """`messages`, if an assistant speaks in it."""
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow(
            f"`{name}` has no assistant turn, so there is nothing to learn", "add the answer as a turn"
        )
    return messages


def side(value: Any, name: str) -> str | Messages:
    """A prompt or an answer: a text, one turn, or a list of turns."""
    if isinstance(value, dict):
        return [_turn(value, name, None)]
    if isinstance(value, list):
        return turns(value, name)
    return text(value, name)


def alike(prompt: str | Messages, *answers: str | Messages) -> tuple[str | Messages, ...]:
    """All as texts, or, where one of them is messages, all as messages."""
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        return prompt, *answers

    def messages(value: str | Messages, role: str) -> Messages:
        return [{"role": role, "content": value}] if isinstance(value, str) else value

    return messages(prompt, "user"), *(messages(answer, "assistant") for answer in answers)
