"""Rows, with their file and line, out of every kind of file and every kind of damage."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from soup.data.files import SUFFIXES, resolve_files
from soup.data.read import READERS, BadRowReport, Row, read_rows
from soup.errors import Refused


@pytest.fixture
def write(tmp_path):
    def given(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return given


def rows(path):
    return [(row.line, row.fields if isinstance(row, Row) else row.why) for row in read_rows([path])]


def test_every_suffix_has_a_reader():
    assert {suffix.removesuffix(".gz") for suffix in SUFFIXES} == set(READERS)


def test_json_lines_with_mark_crlf_and_blank_lines(write):
    path = write("a.jsonl", b'\xef\xbb\xbf{"text": "\xc3\xbc"}\r\n\r\n{"text": "b"}\r\n')
    assert rows(path) == [(1, {"text": "ü"}), (3, {"text": "b"})]


def test_bad_json_lines_are_reported_and_the_rest_is_read(write):
    nested = "[" * 100_000
    lines = [
        '{"text": "a"}',
        '{"text": ',
        "[1, 2]",
        "7",
        nested,
        "null",
        '{"n": ' + "9" * 5000 + "}",
        '{"text": "z"}',
    ]
    path = write("a.jsonl", "\n".join(lines).encode() + b'\n{"text": "\xff"}')
    found = rows(path)
    assert [line for line, _ in found] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert found[0] == (1, {"text": "a"}) and found[7] == (8, {"text": "z"})
    for (_, why), expected in zip(
        found[1:7],
        ["malformed JSON", "a list of 2", "a number (7)", "nested too deeply", "null", "malformed JSON"],
        strict=True,
    ):
        assert expected in why
    assert "not UTF-8 at byte 11" in found[8][1]


def test_json_array_tells_the_line_of_each_element(write):
    path = write("a.json", '[\n  {"text": "a"},\n  {\n    "text": "b"\n  }, {"text": "c"},\n\n  3\n]\n')
    assert [line for line, _ in rows(path)] == [2, 3, 5, 7]
    assert rows(path)[3] == (7, "the row is a number (3), not an object")


def test_json_lines_named_json_and_a_single_object(write):
    assert rows(write("a.json", '{"text": "a"}\n{"text": "b"}\n')) == [(1, {"text": "a"}), (2, {"text": "b"})]
    assert rows(write("b.json", '{\n "text": "a"\n}\n')) == [(1, {"text": "a"})]
    assert "malformed" in rows(write("c.json", '{"text": "a"\n{"text": "b"}\n'))[0][1]


@pytest.mark.parametrize(
    ("name", "content", "key", "why"),
    [
        ("a.json", '[{"text": "a"},\n{"text": ]', "a.json:2", "malformed JSON"),
        ("a.json", '[{"text": "a"},\n]', "a.json:2", "malformed JSON"),
        ("a.json", '[{"text": "a"}', "a.json:1", "expected ','"),
        ("a.json", "[]\n[]", "a.json:2", "after the array's end"),
        ("a.jsonl", b"\x00\x01\x02\xff" * 100, "a.jsonl", "binary"),
        ("a.json", b"\x89PNG\x00\x00", "a.json", "binary"),
        ("a.txt", "ü".encode("utf-16"), "a.txt", "UTF-16"),
        ("a.txt", b"good\nbad \xff\n", "a.txt:2", "not UTF-8"),
        ("a.csv", b"text\nbad \xff\n", "a.csv:1", "not UTF-8"),
        ("a.csv", 'text\n"a\nb\nc\n', "a.csv:2", "never closes"),
        ("a.csv", "text,text\na,b\n", "a.csv:1", "one name"),
        ("a.parquet", b"not parquet at all", "a.parquet", "not a Parquet file"),
        ("a.jsonl.gz", b"not gzip at all", "a.jsonl.gz", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_on_is_refused(write, name, content, key, why):
    path = write(name, content)
    with pytest.raises(Refused) as refused:
        list(read_rows([path]))
    (problem,) = refused.value.problems
    assert problem.key.endswith(key) and why in problem.why and problem.fix


def test_csv_lines_quotes_and_nested_conversations(write):
    messages = json.dumps([{"role": "user", "content": "a"}]).replace('"', '""')
    path = write("a.csv", f'text,messages\r\n"one\r\ntwo",\r\nNaN,"{messages}"\r\nthree\r\nx,[\r\n')
    found = rows(path)
    assert found[0] == (2, {"text": "one\r\ntwo", "messages": ""})
    assert found[1] == (4, {"text": "NaN", "messages": [{"role": "user", "content": "a"}]})
    assert found[2] == (5, "1 cells where the header has 2")
    assert found[3][0] == 6 and "`messages` is not JSON" in found[3][1]
    assert rows(write("a.tsv", "text\tn\na\t1\n")) == [(2, {"text": "a", "n": "1"})]
    assert rows(write("long.csv", "text\n" + "x" * 300_000 + "\n"))[0][1]["text"] == "x" * 300_000


def test_parquet_counts_rows(tmp_path):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": ["a", None, "c"], "n": [1.0, float("nan"), 2.0]}), path)
    assert [row.where for row in read_rows([path])] == [f"{path}:row {n}" for n in (1, 2, 3)]
    assert [row.fields["text"] for row in read_rows([path])] == ["a", None, "c"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\ntwo\n", [(1, "one"), (2, "two")]),
        ("a.txt", "\n\none\ntwo\n \n\nthree\n", [(3, "one\ntwo"), (7, "three")]),
        ("a.txt", "one\n\ntwo\n<|endoftext|>\nthree\n</s>\n", [(1, "one\n\ntwo"), (5, "three")]),
        ("a.md", "# one\n\ntwo\n", [(1, "# one\n\ntwo")]),
        ("a.txt", "one\r\n\r\ntwo\r\n", [(1, "one"), (3, "two")]),
        ("a.txt", "", []),
    ],
)
def test_documents_of_text_files(write, name, content, expected):
    assert [(line, fields["text"]) for line, fields in rows(write(name, content))] == expected


def test_gzip_is_read_as_what_it_holds(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert rows(path) == [(1, {"text": "a"})]


def test_a_huge_line_is_one_row(write):
    path = write("a.jsonl", json.dumps({"text": "ü" * 5_000_000}))
    ((line, fields),) = rows(path)
    assert line == 1 and len(fields["text"]) == 5_000_000


def test_files_folders_globs_and_several(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("d/b.jsonl", "d/a.json", "d/sub/c.csv", "d/README.md", "d/.hidden.json", "d/x.py", "e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    names = lambda given: [str(file) for file in resolve_files(given)]  # noqa: E731
    assert names("d") == ["d/a.json", "d/b.jsonl", "d/sub/c.csv"]
    assert names("d/*.json*") == ["d/a.json", "d/b.jsonl"]
    assert names("e.txt, d/b.jsonl") == names(["e.txt", "d/b.jsonl"]) == ["e.txt", "d/b.jsonl"]
    assert [row for row in read_rows(resolve_files("d/b.jsonl"))] == []


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("nothing.jsonl", "no such file"),
        ("./org/name", "no such file"),
        ("empty", "holds no data file"),
        ("*.zip", "matches no data file"),
        ("a.bin", "not read"),
        ("", "is empty"),
        ("x\0y", "not a path"),
        ("x" * 5000, "cannot be looked up"),
        (["a.json", "./a.json"], "named twice"),
    ],
)
def test_what_names_nothing_is_refused_with_the_key(tmp_path, monkeypatch, given, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.bin").write_text("")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(Refused) as refused:
        resolve_files(given, key="data.eval")
    assert [problem.key for problem in refused.value.problems] == ["data.eval"]
    assert why in refused.value.problems[0].why


def test_all_that_is_wrong_with_several_is_said_at_once():
    with pytest.raises(Refused) as refused:
        resolve_files("no.json,none.csv")
    assert [problem.value for problem in refused.value.problems] == ["no.json", "none.csv"]


def test_a_hub_name_is_downloaded_or_refused_readably(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(name, **_):
        raise ConnectionError(f"cannot reach the hub for {name}\nlong explanation")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(Refused, match="hub did not give it: cannot reach the hub for org/name\n"):
        resolve_files("org/name")

    snapshot = tmp_path / "snapshot"
    (snapshot / "data").mkdir(parents=True)
    for name in ("data/train-0.parquet", "data/test-0.parquet", "README.md"):
        (snapshot / name).write_text("")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    assert resolve_files("org/name") == [snapshot / "data/train-0.parquet"]
    assert resolve_files("org/name", key="data.eval") == [snapshot / "data/test-0.parquet"]


def test_a_bad_row_names_its_place():
    problem = BadRowReport("rows.jsonl", 7, "why", "fix it").problem("data.on_bad_row=skip")
    assert (problem.key, problem.fix) == ("rows.jsonl:7", "fix it; or data.on_bad_row=skip")
