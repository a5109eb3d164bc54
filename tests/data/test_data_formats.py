"""Formats told apart, brought to their shapes, and refused row by row."""

import pytest

from soup.data.formats import FORMATS, detect, normalise
from soup.data.rows import BadRow
from soup.data.shapes import ACCEPTS, to_shape


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
MESSAGES = {"messages": [user("Hi"), assistant("Ho")]}
COMPLETION = {"prompt": "Hi", "completion": " Ho"}
PREFERENCE = {"prompt": "Hi", "chosen": " Ho", "rejected": " No"}
UNPAIRED = {"prompt": "Hi", "completion": " Ho", "label": True}
PROMPT = {"prompt": "Hi", "answer": 3}
TEXT = {"text": "Once."}
EXAMPLES = dict(
    zip(FORMATS, (ALPACA, SHAREGPT, MESSAGES, COMPLETION, PREFERENCE, UNPAIRED, PROMPT, TEXT), strict=True)
)


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_is_detected_and_normalised(format):
    row = EXAMPLES[format]
    assert detect(row) == format
    assert detect(row | {"other": 1, "empty": None}) == format
    assert normalise(row, format)


def test_null_columns_and_common_extra_ones_do_not_mislead():
    assert detect({"messages": None, "text": "a"}) == "text"
    assert detect(ALPACA | {"text": "the whole again"}) == "alpaca"
    assert detect(MESSAGES | {"prompt": "Hi", "prompt_id": "7"}) == "messages"
    assert detect({"text": "a", "label": 1}) == "text"
    assert detect({"conversations": [user("a")]}) == "messages"
    assert detect({"question": "a", "answer": "b"}) is None


@pytest.mark.parametrize(
    ("format", "fields", "expected"),
    [
        ("alpaca", ALPACA, {"messages": [user("Add.\n1 2"), assistant("3")]}),
        ("alpaca", ALPACA | {"input": None}, {"messages": [user("Add."), assistant("3")]}),
        (
            "alpaca",
            ALPACA | {"input": "", "history": [["a", "b"]], "system": "S"},
            {"messages": [system("S"), user("a"), assistant("b"), user("Add."), assistant("3")]},
        ),
        ("sharegpt", SHAREGPT | {"system": "S"}, {"messages": [system("S"), user("Hi"), assistant("Ho")]}),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": "f()"},
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "b"},
                ]
            },
            {
                "messages": [
                    system("S"),
                    user("a"),
                    assistant("f()"),
                    {"role": "tool", "content": "1"},
                    assistant("b"),
                ]
            },
        ),
        (
            "messages",
            {
                "messages": [
                    user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
                    assistant("c") | {"name": "x"},
                ]
            },
            {"messages": [user("ab"), assistant("c")]},
        ),
        ("prompt_completion", COMPLETION | {"more": 1}, COMPLETION),
        (
            "prompt_completion",
            {"prompt": [user("a")], "completion": "b"},
            {"prompt": [user("a")], "completion": [assistant("b")]},
        ),
        (
            "prompt_completion",
            {"prompt": "a", "completion": "b", "system": "S"},
            {"prompt": [system("S"), user("a")], "completion": [assistant("b")]},
        ),
        ("preference", PREFERENCE, PREFERENCE),
        # LLaMA-Factory's dpo_en_demo.json
        (
            "preference",
            {
                "conversations": SHAREGPT["conversations"][:1],
                "chosen": {"from": "gpt", "value": "b"},
                "rejected": {"from": "gpt", "value": "c"},
            },
            {"prompt": [user("Hi")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        ),
        # Whole conversations that share a prefix, the prompt beside them, as in HuggingFaceH4's sets
        (
            "preference",
            {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        ),
        (
            "preference",
            {
                "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
                "rejected": [user("a"), assistant("b"), user("C"), assistant("d")],
            },
            {
                "prompt": [user("a")],
                "chosen": [assistant("b"), user("c"), assistant("d")],
                "rejected": [assistant("b"), user("C"), assistant("d")],
            },
        ),
        (
            "preference",
            {"chosen": "Q: a A: yes", "rejected": "Q: a A: no"},
            {"prompt": "Q: a A:", "chosen": " yes", "rejected": " no"},
        ),
        (
            "preference",
            {"instruction": "a", "input": "b", "chosen": "c", "rejected": "d"},
            {"prompt": [user("a\nb")], "chosen": [assistant("c")], "rejected": [assistant("d")]},
        ),
        ("unpaired", UNPAIRED | {"label": "False"}, UNPAIRED | {"label": False}),
        ("unpaired", UNPAIRED | {"label": 1}, UNPAIRED),
        ("unpaired", UNPAIRED | {"label": "0"}, UNPAIRED | {"label": False}),
        ("prompt", PROMPT, PROMPT),
        ("prompt", {"prompt": [user("a")], "n": None}, {"prompt": [user("a")], "n": None}),
        ("text", TEXT | {"id": 1}, TEXT),
    ],
)
def test_normalise(format, fields, expected):
    assert normalise(fields, format) == expected


@pytest.mark.parametrize(
    ("format", "fields", "why"),
    [
        ("alpaca", {"instruction": "a"}, "`output` is missing (columns here: instruction)"),
        ("alpaca", ALPACA | {"output": None}, "`output` is null"),
        ("alpaca", ALPACA | {"output": " \n"}, "`output` is empty"),
        ("alpaca", ALPACA | {"output": 42}, "`output` is a number (42), not a text"),
        ("alpaca", ALPACA | {"output": float("nan")}, "a number (nan)"),
        ("alpaca", ALPACA | {"output": True}, "`output` is true"),
        ("alpaca", ALPACA | {"output": ["a"]}, "`output` is a list of 1"),
        ("alpaca", ALPACA | {"output": "a\ud800b"}, "half a surrogate pair at character 2"),
        ("alpaca", ALPACA | {"input": 7}, "`input` is a number (7)"),
        ("alpaca", ALPACA | {"history": "x"}, "`history` is a text"),
        ("alpaca", ALPACA | {"history": [["a"]]}, "`history[0]` is a list of 1"),
        ("alpaca", ALPACA | {"history": [["a", None]]}, "`history[0][1]` is null"),
        ("alpaca", ALPACA | {"system": 3}, "`system` is a number"),
        ("alpaca", MESSAGES, "format messages; alpaca is needed"),
        ("messages", SHAREGPT, "has from/value where role/content is needed"),
        ("sharegpt", MESSAGES, "from/value is needed"),
        ("messages", {"messages": []}, "has no turns"),
        ("messages", {"messages": "[]"}, "`messages` is a text, not a list"),
        ("messages", {"messages": [None]}, "`messages[0]` is null"),
        ("messages", {"messages": [user("a")]}, "no assistant turn"),
        ("messages", {"messages": [user("a"), assistant("")]}, "`messages[1].content` is empty"),
        ("messages", {"messages": [user("a"), {"role": "assistant"}]}, "`messages[1].content` is null"),
        ("messages", {"messages": [user("a"), {"role": "boss", "content": "b"}]}, "'boss', which is no role"),
        (
            "messages",
            {"messages": [user("a"), {"role": ["x"], "content": "b"}]},
            "`messages[1].role` is a list",
        ),
        ("messages", {"messages": [user([{"type": "image"}]), assistant("a")]}, "parts that are not text"),
        (
            "messages",
            {"messages": [user("a"), assistant("b") | {"tool_calls": [1]}]},
            "tool_calls` is not supported",
        ),
        ("messages", MESSAGES | {"tools": "[{}]"}, "`tools` is not supported"),
        ("messages", {"messages": [system("S"), *MESSAGES["messages"]], "system": "T"}, "two system prompts"),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": None}]},
            "`conversations[0].value` is null",
        ),
        ("sharegpt", {"conversations": [{"from": "dog", "value": "w"}]}, "'dog', which is no role"),
        ("prompt_completion", {"prompt": "a"}, "format prompt; prompt_completion is needed"),
        ("prompt_completion", {"prompt": "", "completion": "b"}, "`prompt` is empty"),
        ("prompt_completion", {"prompt": None, "completion": "b"}, "`prompt` is null"),
        (
            "prompt_completion",
            {"prompt": [user("a")], "completion": [user("b")]},
            "a turn of user, not of the",
        ),
        ("preference", PREFERENCE | {"rejected": " Ho"}, "are the same"),
        ("preference", {"prompt": "a", "chosen": "b"}, "format prompt; preference is needed"),
        ("preference", {"chosen": "abc", "rejected": "xyz"}, "prompt would be empty"),
        (
            "preference",
            {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("b")]},
            "share no prompt",
        ),
        ("preference", {"chosen": 3, "rejected": "a", "prompt": "b"}, "`chosen` is a number (3)"),
        ("unpaired", UNPAIRED | {"label": "yes"}, "`label` is 'yes'"),
        ("unpaired", UNPAIRED | {"label": 2}, "`label` is a number (2)"),
        ("unpaired", UNPAIRED | {"label": None}, "`label` is null"),
        ("unpaired", COMPLETION, "format prompt_completion; unpaired is needed"),
        ("prompt", {"prompt": [user("a"), assistant("b")]}, "ends with an assistant turn"),
        ("prompt", {"prompt": 3}, "`prompt` is a number"),
        ("text", {"text": ""}, "`text` is empty"),
        ("text", ALPACA, "format alpaca; text is needed"),
        ("text", {"\ud800": 1}, "columns here: \\ud800"),
    ],
)
def test_bad_rows_say_why_and_how_to_fix(format, fields, why):
    with pytest.raises(BadRow) as bad:
        normalise(fields, format)
    assert why in bad.value.why
    assert bad.value.fix
    bad.value.why.encode()


def test_unpairing_and_prompts_out_of_conversations():
    assert to_shape(PREFERENCE, "preference", "unpaired") == [
        {"prompt": "Hi", "completion": " Ho", "label": True},
        {"prompt": "Hi", "completion": " No", "label": False},
    ]
    talk = {"messages": [user("a"), assistant("b"), user("c"), assistant("d"), user("e")], "level": 2}
    assert to_shape(talk, "messages", "prompt") == [
        {"solution": "d", "level": 2, "prompt": [user("a"), assistant("b"), user("c")]}
    ]
    assert to_shape(ALPACA, "alpaca", "prompt") == [{"solution": "3", "prompt": [user("Add.\n1 2")]}]
    assert to_shape(COMPLETION, "prompt_completion", "prompt") == [{"solution": " Ho", "prompt": "Hi"}]
    with pytest.raises(BadRow, match="nothing is asked"):
        to_shape({"messages": [assistant("a"), user("b")]}, "messages", "prompt")


def test_every_format_is_accepted_by_some_shape():
    assert set().union(*ACCEPTS.values()) == set(FORMATS)
