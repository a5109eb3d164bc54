"""Statistics before anything is tokenised, and the fingerprint that names the result."""

import random

import pytest

from soup.data.prepare import SAMPLED_ROWS, fingerprint, lengths, prepare


def pairs(number):
    return [{"instruction": f"Add {n} and {n}.", "output": f"It is {2 * n}."} for n in range(number)]


def test_lengths_equal_the_report_and_write_nothing(arguments, tmp_path):
    given = arguments(pairs(300), eval_fraction=0.1)
    measured = lengths(**given)
    assert not (tmp_path / "cache").exists()
    made = prepare(**given)
    for split, one in made.items():
        assert measured[split].to_dict() == one.report.to_dict() | {"bytes": 0}
    assert lengths(**given) == {split: one.report for split, one in made.items()}


def test_lengths_of_large_data_are_sampled_and_say_so(arguments):
    draw = random.Random(3)
    rows = [{"text": "word " * draw.randint(1, 30)} for _ in range(3 * SAMPLED_ROWS)]
    given = arguments(rows, shape="text")
    sampled, whole = lengths(**given)["train"], prepare(**given)["train"].report
    assert sampled.sampled and not whole.sampled
    assert sampled.rows == whole.rows == 3 * SAMPLED_ROWS
    assert sampled.lengths["sum"] == pytest.approx(whole.lengths["sum"], rel=0.05)
    assert lengths(**given | {"max_samples": 4000})["train"].rows == 4000


def test_the_fingerprint_is_of_content_and_settings(arguments, tmp_path):
    given = arguments(pairs(3))
    same = tmp_path / "copy.jsonl"
    same.write_bytes((tmp_path / "rows.jsonl").read_bytes())
    assert fingerprint(**given) == fingerprint(**given | {"train": str(same), "num_proc": 2, "split_seed": 5})
    others = [
        {"max_length": 511},
        {"on_too_long": "skip"},
        {"on_bad_row": "skip"},
        {"format": "alpaca"},
        {"shape": "text"},
        {"max_samples": 2},
        {"eval_fraction": 0.5},
        {"eval": str(same)},
        {"chat_template": "{{ messages }}"},
    ]
    prints = {fingerprint(**given | other) for other in others} | {fingerprint(**given)}
    assert len(prints) == len(others) + 1
    same.write_text(same.read_text() + "\n")
    assert fingerprint(**given) != fingerprint(**given | {"train": str(same)})
