"""The whole way: refusals with file and line, policies, splits, statistics and what the trainers read."""

import json
import subprocess
import sys
from os.path import commonprefix

import pytest

from soup.data.prepare import prepare
from soup.data.report import BAD_KEPT, Report
from soup.errors import Refused


def pairs(number):
    return [{"instruction": f"Add {n} and {n}.", "output": f"It is {2 * n}."} for n in range(number)]


def load(prepared):
    from datasets import Dataset

    return Dataset.from_file(str(prepared.open()))


def refusal(arguments):
    with pytest.raises(Refused) as refused:
        prepare(**arguments)
    return refused.value.problems


def test_trainers_read_what_was_prepared(arguments, encoder):
    rows = pairs(2500)
    made = prepare(**arguments(rows))
    assert list(made) == ["train"] and made["train"].columns == ("input_ids", "labels")
    dataset = load(made["train"])
    assert dataset.column_names == ["input_ids", "labels"] and len(dataset) == 2500
    for index in (0, 999, 1000, 2499):
        example = {
            "messages": [
                {"role": "user", "content": rows[index]["instruction"]},
                {"role": "assistant", "content": rows[index]["output"]},
            ]
        }
        expected = encoder().encode("conversation", example).columns
        assert dataset[index] == {name: ids.tolist() for name, ids in expected.items()}
    report = made["train"].report
    assert report.rows == 2500 and report.format == "alpaca" and not report.sampled
    assert report.lengths["sum"] == sum(map(len, dataset["input_ids"]))
    assert report.lengths["sum_labels"] == sum(label != -100 for row in dataset["labels"] for label in row)
    begin = commonprefix(dataset["input_ids"][:])
    assert report.lengths["common"] == len(begin) > 3 and report.lengths["shared"] == 0
    assert sum(report.lengths["histogram"]["counts"]) == 2500
    assert report.bytes == made["train"].open().stat().st_size
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


BAD = [
    '{"instruction": "a"',
    '{"instruction": "a"}',
    '{"instruction": "a", "output": ""}',
    '{"instruction": "a", "output": 3}',
    '{"instruction": "a", "output": null}',
    '["a"]',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
]


def test_bad_rows_are_refused_together_each_with_file_and_line(arguments, tmp_path):
    good = [json.dumps(row) for row in pairs(20)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*good, *BAD, *good]))
    problems = refusal(arguments(train=str(file)))
    assert [problem.key for problem in problems[:-1]] == [f"{file}:{20 + n}" for n in range(1, 8)]
    assert all("data.on_bad_row=skip" in problem.fix for problem in problems)
    assert "format messages; alpaca is needed" in problems[6].why
    assert (problems[-1].key, problems[-1].why) == ("data.on_bad_row", "bad rows: 7")

    report = prepare(**arguments(train=str(file), on_bad_row="skip"))["train"].report
    assert (report.rows, report.bad_total, len(report.bad)) == (40, 7, 7)
    assert report.bad[3] | {"fix": ""} == {
        "source": str(file),
        "line": 24,
        "why": "`output` is a number (3), not a text",
        "fix": "",
    }


def test_at_most_twenty_bad_rows_are_named_and_all_counted(arguments):
    problems = refusal(arguments([*pairs(60), *[{"instruction": "a"}] * 50]))
    assert len(problems) == BAD_KEPT + 1 and problems[-1].why == "bad rows: 50"


def test_the_format_is_told_by_readable_rows_however_many_bad_ones_come_first(arguments, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("{\n" * 150 + json.dumps(pairs(1)[0]))
    report = prepare(**arguments(train=str(file), on_bad_row="skip"))["train"].report
    assert (report.rows, report.bad_total, report.format) == (1, 150, "alpaca")


def test_a_given_format_is_enforced(arguments):
    rows = [*pairs(2), {"text": "a"}]
    problems = refusal(arguments(rows, format="text"))
    assert "format alpaca; text is needed" in problems[0].why and len(problems) == 3
    (problem,) = refusal(arguments(pairs(2), format="preference", shape="conversation"))
    assert problem.key == "data.format" and problem.value == "preference"


@pytest.mark.parametrize(
    ("shape", "rows", "seen"),
    [
        ("preference", pairs(3), "alpaca"),
        ("unpaired", pairs(3), "alpaca"),
        ("conversation", [{"prompt": "a", "chosen": "b", "rejected": "c"}], "preference"),
        ("prompt", [{"text": "a"}], "text"),
        ("text", [{"prompt": "a", "completion": "b", "label": True}], "unpaired"),
    ],
)
def test_data_of_another_shape_are_refused_with_what_was_seen_and_how_to_convert(
    arguments, shape, rows, seen
):
    (problem,) = refusal(arguments(rows, shape=shape))
    assert problem.key == "data.train" and f"format {seen}; the task needs {shape} rows" in problem.why
    assert "Accepted: " in problem.fix


def test_unknown_columns_and_empty_data_are_refused(arguments, tmp_path):
    (problem,) = refusal(arguments([{"question": "a", "answer": "b"}]))
    assert problem.key.endswith("rows.jsonl:1") and "its columns are question, answer" in problem.why
    (problem,) = refusal(arguments([]))
    assert (problem.key, problem.why) == ("data.train", "there is no row in it")
    problems = refusal(arguments([{"instruction": "a"}] * 3, format="alpaca", on_bad_row="skip"))
    assert "no row is left of 3: 3 bad" in problems[0].why
    problems = refusal(arguments(train=str(tmp_path / "no.json"), eval=str(tmp_path / "none.json")))
    assert problems[0].key == "data.train"


def test_what_is_wrong_in_both_files_is_said_together(arguments, tmp_path):
    bad = tmp_path / "eval.jsonl"
    bad.write_text('{"instruction": "a", "output": ""}')
    problems = refusal(arguments([{"instruction": "", "output": "a"}], eval=str(bad)))
    assert [problem.key.rsplit("/")[-1] for problem in problems] == [
        "rows.jsonl:1",
        "data.on_bad_row",
        "eval.jsonl:1",
        "data.on_bad_row",
    ]


@pytest.mark.parametrize(
    ("replaced", "key"),
    [
        ({"format": "alpacca"}, "data.format"),
        ({"on_bad_row": "ignore"}, "data.on_bad_row"),
        ({"on_too_long": "wrap"}, "data.on_too_long"),
        ({"max_length": 0}, "data.max_length"),
        ({"max_samples": 0}, "data.max_samples"),
        ({"num_proc": 0}, "data.num_proc"),
        ({"eval_fraction": 1.0}, "data.eval_fraction"),
        ({"eval_fraction": -0.1}, "data.eval_fraction"),
        ({"eval_fraction": 0.1, "eval": "x"}, "data.eval_fraction"),
        ({"eval_fraction": 0.1, "rows": pairs(1)}, "data.eval_fraction"),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments, replaced, key):
    problems = refusal(arguments(**{"rows": pairs(3)} | replaced))
    assert [problem.key for problem in problems] == [key]


LONG = [
    {"instruction": "a", "output": "b"},
    {"instruction": "a", "output": "long " * 50},
    {"instruction": "long " * 50, "output": "b"},
]


def test_too_long_rows_are_truncated_skipped_or_refused_and_counted(arguments):
    made = prepare(**arguments(LONG, max_length=60))["train"]
    report = made.report
    assert (report.rows, report.truncated, report.dropped_nothing_left, report.skipped) == (2, 1, 1, 0)
    assert report.lengths["max"] == 60 < report.lengths["longest"]
    assert all(any(label != -100 for label in row) for row in load(made)["labels"])

    report = prepare(**arguments(LONG, max_length=60, on_too_long="skip"))["train"].report
    assert (report.rows, report.truncated, report.dropped_nothing_left, report.skipped) == (1, 0, 0, 2)

    problems = refusal(arguments(LONG, max_length=60, on_too_long="refuse"))
    assert [problem.key.rsplit(":")[-1] for problem in problems] == ["2", "3", "data.on_too_long"]
    assert f"data.max_length={report.lengths['longest']}" in problems[-1].fix
    longest = report.lengths["longest"]
    assert prepare(**arguments(LONG, max_length=longest, on_too_long="refuse"))["train"].report.rows == 3


def test_documents_end_with_the_end_token(arguments, tmp_path, encoder):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n\nthree " + "long " * 100)
    made = prepare(**arguments(train=str(file), shape="text", max_length=50))["train"]
    first, second = load(made).to_list()
    assert encoder().tokenizer.decode(first["input_ids"], skip_special_tokens=False) == "one\ntwo<|im_end|>"
    assert first["labels"] == first["input_ids"] and len(second["labels"]) == 50
    assert made.report.truncated == 1


SIDE = [{"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("shape", "rows", "expected"),
    [
        (
            "preference",
            [{"prompt": "a", "chosen": "b", "rejected": "c", "score": 1}],
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
        ),
        (
            "preference",
            [{"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}],
            [
                {
                    "prompt": [{"role": "user", "content": "a"}],
                    "chosen": SIDE,
                    "rejected": [{"role": "assistant", "content": "c"}],
                }
            ],
        ),
        (
            "unpaired",
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
            [
                {"prompt": "a", "completion": "b", "label": True},
                {"prompt": "a", "completion": "c", "label": False},
            ],
        ),
        (
            "unpaired",
            [{"prompt": "a", "completion": "b", "label": "0"}],
            [{"prompt": "a", "completion": "b", "label": False}],
        ),
        (
            "prompt",
            [{"prompt": "a", "answer": 3, "tests": ["x"]}, {"prompt": "b", "meta": {"k": 1.5}}],
            [
                {"prompt": "a", "answer": 3, "tests": ["x"], "meta": None},
                {"prompt": "b", "answer": None, "tests": None, "meta": {"k": 1.5}},
            ],
        ),
    ],
)
def test_shapes_with_a_prompt_apart_keep_their_columns(arguments, shape, rows, expected):
    made = load(prepare(**arguments(rows, shape=shape))["train"]).to_list()
    assert [{k: v for k, v in row.items() if not k.endswith("_ids")} for row in made] == expected


def test_texts_and_messages_do_not_mix_where_trl_reads_the_first_row_only(arguments):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"},
    ]
    problems = refusal(arguments(rows, shape="preference"))
    assert (
        problems[0].key.endswith(":2") and "written as messages, those before it as texts" in problems[0].why
    )


def test_a_reward_column_of_two_kinds_is_refused_by_name(arguments):
    (problem,) = refusal(
        arguments([{"prompt": "a", "answer": 3}, {"prompt": "b", "answer": "x"}], shape="prompt")
    )
    assert "`answer` cannot be one column (int, str)" in problem.why


def test_a_prompt_that_leaves_no_room_is_dropped_and_counted(arguments):
    rows = [
        {"prompt": "long " * 50, "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    report = prepare(**arguments(rows, shape="preference", max_length=40))["train"].report
    assert (report.rows, report.dropped_nothing_left) == (1, 1)


def test_what_pairs_begin_with_alike_is_counted(arguments):
    rows = [{"prompt": f"Say {word}.", "chosen": "b", "rejected": "c d"} for word in ("a", "nothing at all")]
    prepared = prepare(**arguments(rows, shape="preference"))["train"]
    prompts = load(prepared)["prompt_ids"][:]
    assert prepared.report.lengths["shared"] == sum(map(len, prompts)) / 2
    assert prepared.report.lengths["common"] == len(commonprefix(prompts)) > 0


def test_the_held_out_split_is_deterministic_disjoint_and_complete(arguments, tmp_path):
    rows = pairs(50) + pairs(10)  # ten rows twice
    made = {seed: prepare(**arguments(rows, eval_fraction=0.2, split_seed=seed)) for seed in (0, 1)}
    again = prepare(**arguments(rows, eval_fraction=0.2, split_seed=0, cache=tmp_path / "other"))
    splits = {name: [tuple(ids) for ids in load(one)["input_ids"]] for name, one in made[0].items()}
    assert (len(splits["train"]), len(splits["eval"])) == (48, 12)
    assert not set(splits["train"]) & set(splits["eval"])
    everything = [tuple(ids) for ids in load(prepare(**arguments(rows))["train"])["input_ids"]]
    assert sorted(splits["train"] + splits["eval"]) == sorted(everything)
    assert splits["eval"] == [tuple(ids) for ids in load(again["eval"])["input_ids"]]
    assert splits["eval"] != [tuple(ids) for ids in load(made[1]["eval"])["input_ids"]]
    assert made[0]["train"].folder == made[0]["eval"].folder != made[1]["train"].folder
    assert made[0]["train"].open("eval") == made[0]["eval"].open()


def test_answers_to_one_prompt_are_not_parted(arguments):
    rows = [{"prompt": f"p{n}", "chosen": "b", "rejected": "c"} for n in range(20)]
    made = prepare(**arguments(rows, shape="unpaired", eval_fraction=0.275))  # 11 of 40 rows
    train, held_out = (set(load(made[name])["prompt"]) for name in ("train", "eval"))
    assert not train & held_out and (len(train), len(held_out)) == (15, 5)


def test_eval_files_and_max_samples(arguments, tmp_path):
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("".join(json.dumps({"text": f"t{n}"}) + "\n" for n in range(4)))
    made = prepare(**arguments(pairs(30), eval=str(held_out), max_samples=7))
    assert (made["train"].report.rows, made["eval"].report.rows) == (7, 4)
    assert (made["train"].report.format, made["eval"].report.format) == ("alpaca", "text")


def numbered(values):
    return [row | {"difficulty": value} for row, value in zip(pairs(len(values)), values, strict=True)]


def test_a_number_is_kept_beside_the_tokens_of_training_rows(arguments, tmp_path):
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in pairs(3)))
    values = [3, 1.5, -2, 0, 1e9]
    made = prepare(**arguments(numbered(values), eval=str(held_out), numbers=("difficulty",)))
    assert load(made["train"])["difficulty"] == values
    assert load(made["eval"]).column_names == ["input_ids", "labels"]
    assert "difficulty" not in prepare(**arguments(numbered(values)))["train"].columns


def test_numbers_follow_their_rows_through_skips_and_splits(arguments):
    rows = numbered([float(n) for n in range(40)])
    for row in rows[::4]:
        row["output"] = "It is long. " * 200
    made = prepare(
        **arguments(rows, numbers=("difficulty",), on_too_long="skip", eval_fraction=0.2, max_length=200)
    )
    kept = [
        (tuple(row["input_ids"]), row["difficulty"])
        for split in made.values()
        for row in load(split).to_list()
    ]
    assert sorted(number for _, number in kept) == [float(n) for n in range(40) if n % 4]
    alone = {
        tuple(load(prepare(**arguments([row]))["train"])[0]["input_ids"]): row["difficulty"]
        for row in rows[1:4]
    }
    assert all(dict(kept)[ids] == number for ids, number in alone.items())


def test_pairs_keep_their_number(arguments):
    rows = [{"prompt": "1?", "chosen": "Yes", "rejected": "No", "difficulty": 4}]
    made = prepare(**arguments(rows, shape="preference", numbers=("difficulty",)))["train"]
    assert load(made)["difficulty"] == [4.0]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("hard", "'hard'"),
        ("3", "'3'"),
        (None, "null"),
        (True, "true"),
        ([1], "a list of 1"),
        (float("nan"), "a number (nan)"),
        (float("inf"), "a number (inf)"),
        (10**400, "very large"),
    ],
)
def test_what_is_no_number_is_refused_with_its_place(arguments, tmp_path, value, said):
    (problem, total) = refusal(arguments(numbered([1, 2, value]), numbers=("difficulty",)))
    assert problem.key == f"{tmp_path / 'rows.jsonl'}:3"
    assert "`difficulty` is" in problem.why and said in problem.why and "finite number" in problem.why
    assert total.key == "data.on_bad_row"
    made = prepare(**arguments(numbered([1, 2, value]), numbers=("difficulty",), on_bad_row="skip"))
    assert load(made["train"])["difficulty"] == [1.0, 2.0]


def test_a_number_that_is_missing_is_refused_with_its_place(arguments, tmp_path):
    rows = numbered([1, 2]) + [{"instruction": "Add.", "output": "It is."}]
    problem = refusal(arguments(rows, numbers=("difficulty",)))[0]
    assert problem.key == f"{tmp_path / 'rows.jsonl'}:3" and "`difficulty` is missing" in problem.why


def test_numbers_of_a_csv_file_are_texts(arguments, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("instruction,output,difficulty\nAdd.,It is.,2.5\nAdd 1.,It is 1.,-1\n")
    made = prepare(**arguments(train=str(file), numbers=("difficulty",)))["train"]
    assert load(made)["difficulty"] == [2.5, -1.0]
    file.write_text("instruction,output,difficulty\nAdd.,It is.,hard\n")
    assert "'hard'" in refusal(arguments(train=str(file), numbers=("difficulty",)))[0].why


THREADS = """
import json, os, sys
from pathlib import Path
from soup.data.prepare import prepare
arguments = json.loads(sys.argv[1])
prepare(**arguments | {"model_folder": Path(arguments["model_folder"]), "cache": Path(arguments["cache"])})
print(len(os.listdir("/proc/self/task")))
"""


def test_it_tokenises_on_as_many_threads_as_asked(arguments, tmp_path):
    """In processes of their own: the tokenizer's pool of threads is made once."""
    found = {}
    for number in (1, 4):
        given = arguments(pairs(2000), num_proc=number, cache=str(tmp_path / str(number)))
        environment = {
            "PYTHONPATH": ":".join(sys.path),
            "TOKENIZERS_PARALLELISM": "true",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", THREADS, json.dumps(given, default=str)],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found[number] = int(done.stdout)
    assert found[4] - found[1] == 3
