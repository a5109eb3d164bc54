"""A few thousand malformed rows and a few hundred malformed files: a message each, and never a traceback."""

import json
import random

from soup.data.formats import FORMATS, detect
from soup.data.prepare import lengths, prepare
from soup.data.rows import BadRow
from soup.data.shapes import ACCEPTS, SHAPES, to_shape
from soup.errors import Refused

ROWS = (
    {"instruction": "Add.", "output": "3", "input": "1 2"},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    {"prompt": "Hi", "completion": " Ho"},
    {"prompt": "Hi", "chosen": " Ho", "rejected": " No"},
    {"prompt": "Hi", "completion": " Ho", "label": True},
    {"prompt": "Hi", "answer": 3},
    {"text": "Once."},
)
JUNK = (
    None,
    True,
    0,
    -1,
    2**200,
    float("nan"),
    float("inf"),
    "",
    " ",
    "x",
    "\ud800",
    "\0",
    [],
    [[]],
    [None],
    ["a"],
    [{}],
    [{"role": "user"}],
    [{"role": "assistant", "content": "x"}],
    [{"from": "gpt", "value": 1}],
    {},
    {"a": 1},
    {"role": "user", "content": []},
    {"from": {}, "value": {}},
    b"bytes",
    [{"role": "user", "content": "a"}, 3],
    [{"role": None, "content": None}],
    [{"role": "user", "content": [{"type": "text", "text": 1}]}],
)


def test_no_malformed_row_escapes_as_another_error():
    """Rows with columns dropped, swapped and filled with junk: an example or a BadRow, no third."""
    draw = random.Random(7)
    columns = sorted({name for row in ROWS for name in row} | {"system", "history", "tools", "label"})
    counts = {"taken": 0, "bad": 0}
    for _ in range(4000):
        row = dict(draw.choice(ROWS))
        for name in draw.sample(columns, draw.randint(1, 4)):
            row[name] = draw.choice(JUNK)
        if draw.random() < 0.3 and row:
            del row[draw.choice(list(row))]
        seen = detect(row)
        assert seen is None or seen in FORMATS
        shape = draw.choice(SHAPES)
        try:
            for example in to_shape(row, draw.choice(ACCEPTS[shape]), shape):
                assert example
            counts["taken"] += 1
        except BadRow as bad:
            assert bad.why and bad.fix
            bad.why.encode()
            counts["bad"] += 1
    assert counts["taken"] > 100 and counts["bad"] > 1000


def test_junk_in_a_reward_column_is_kept_or_refused(arguments):
    kept = 0
    for junk in JUNK:
        if not isinstance(junk, bytes):
            try:
                prepare(**arguments([{"prompt": "a", "answer": junk}], shape="prompt"))
                kept += 1
            except Refused as refused:
                assert "`answer`" in refused.problems[0].why
    assert kept > 10


def test_a_few_hundred_malformed_files_give_problems_and_never_a_traceback(arguments, tmp_path):
    """Bytes of good files flipped, cut, doubled and dropped; each is prepared or refused with a fix."""
    draw = random.Random(11)
    good = {
        "jsonl": "\n".join(json.dumps(row) for row in ROWS[:1] * 3),
        "json": json.dumps(ROWS[:1] * 3, indent=1),
        "csv": "instruction,output\n"
        + "\n".join(f'"{r["instruction"]}",{r["output"]}' for r in ROWS[:1] * 3),
        "txt": "one\n\ntwo\n",
        "parquet": "PAR1" + "\0" * 30 + "PAR1",
    }
    seen = {"prepared": 0, "refused": 0}
    for number in range(300):
        suffix = draw.choice(list(good))
        raw = bytearray(good[suffix].encode())
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(raw))
            change = draw.randrange(4)
            if change == 0:
                raw[at] = draw.randrange(256)
            elif change == 1:
                del raw[at : at + draw.randint(1, 20)]
                raw = raw or bytearray(b" ")
            elif change == 2:
                raw[at:at] = draw.choice([b'"', b"{", b"]", b"\xff", b"\0", b"null", b"\r", b",", b"\\ud800"])
            else:
                raw = raw[: max(at, 1)]
        file = tmp_path / f"{number}.{suffix}"
        file.write_bytes(raw)
        try:
            lengths(**arguments(train=str(file), on_bad_row=draw.choice(["refuse", "skip"])))
            seen["prepared"] += 1
        except Refused as refused:
            assert all(problem.why and problem.fix for problem in refused.problems)
            str(refused).encode()
            seen["refused"] += 1
    assert min(seen.values()) > 30
