"""Several sources: their order, their shares, formats of their own, what is refused; and the order of a stream."""

import itertools
import json
from collections import Counter

import pytest

from soup.data.mix import mixed, shuffled
from soup.data.prepare import fingerprint, lengths, prepare
from soup.errors import Refused


def load(prepared):
    from datasets import Dataset

    return Dataset.from_file(str(prepared.open()))


@pytest.fixture
def write(tmp_path):
    def written(name, rows):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return written


@pytest.fixture
def two(write):
    """An alpaca file of 60 rows, and a file of 100 conversations."""
    alpaca = [{"instruction": f"Add {n}.", "output": f"a{n}"} for n in range(60)]
    chats = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"m{n}"}]}
        for n in range(100)
    ]
    return [write("alpaca.jsonl", alpaca), write("chats.jsonl", chats)]


def refusal(arguments):
    with pytest.raises(Refused) as refused:
        prepare(**arguments)
    return refused.value.problems


def test_every_beginning_of_a_mix_has_the_shares_and_no_row_is_there_twice():
    shares = [0.5, 0.3, 0.15, 0.05]
    rows = list(mixed([iter(range(1000)) for _ in shares], shares))
    assert Counter(number for number, _ in rows)[0] == 1000, "it ends where the source whose turn it is ends"
    for end in (1, 2, 7, 50, 333, len(rows)):
        counts = Counter(number for number, _ in rows[:end])
        assert all(abs(counts[n] - share * end) <= 1.5 for n, share in enumerate(shares))
    for number in range(4):
        own = [row for source, row in rows if source == number]
        assert own == list(range(len(own))), "the rows of a source keep their order"


def test_without_shares_one_source_follows_the_other():
    assert list(mixed([iter("ab"), iter("c")], None)) == [(0, "a"), (0, "b"), (1, "c")]


@pytest.mark.parametrize(("rows", "buffer"), [(0, 3), (5, 10), (2500, 100), (10, 10), (10, 1)])
def test_rows_are_drawn_as_datasets_draws_them(rows, buffer):
    from datasets import IterableDataset

    theirs = IterableDataset.from_generator(lambda: ({"n": n} for n in range(rows)))
    expected = [row["n"] for row in theirs.shuffle(seed=7, buffer_size=buffer)] if rows else []
    assert list(shuffled(iter(range(rows)), buffer_rows=buffer, seed=7)) == expected


def test_sources_of_different_formats_are_recognised_each_for_itself(arguments, two, encoder):
    made = prepare(**arguments(train=two))["train"]
    assert (made.report.rows, made.report.format) == (160, "alpaca + messages")
    assert [(s["format"], s["read"], s["rows"]) for s in made.report.sources] == [
        ("alpaca", 60, 60),
        ("messages", 100, 100),
    ]
    assert made.sources().tolist() == [0] * 60 + [1] * 100
    said = encoder().tokenizer.decode(load(made)[60]["input_ids"], skip_special_tokens=False)
    assert "Say 0." in said and "m0" in said
    by_comma = prepare(**arguments(train=",".join(two)))["train"]
    assert by_comma.folder == made.folder, "names separated by commas are the same sources"


def test_weights_are_the_shares_of_rows_and_the_mix_is_reported(arguments, two, encoder):
    made = prepare(**arguments(train=two, weights=[3.0, 1.0]))["train"]
    counts = Counter(made.sources().tolist())
    assert counts == {0: 60, 1: 20} and made.report.rows == 80
    assert [(s["read"], s["rows"]) for s in made.report.sources] == [(60, 60), (100, 20)]
    answers = [
        encoder().tokenizer.decode([t for t in labels if t != -100], skip_special_tokens=True).strip()
        for labels in load(made)["labels"]
    ]
    assert [sorted(answers[at : at + 4])[-1][0] for at in range(0, 80, 4)] == ["m"] * 20
    assert answers[0] == "a0" and answers[2] == "m0"
    assert [answer[0] for answer in answers].count("m") == 20, "counted in the rows themselves"
    assert prepare(**arguments(train=two, weights=[3.0, 1.0], max_samples=8))["train"].report.rows == 8


def graded(write):
    """Rows with a difficulty in two formats: 0, 1, ... and 100, 101, ..."""
    alpaca = [{"instruction": f"Add {n}.", "output": f"a{n}", "difficulty": n} for n in range(20)]
    texts = [{"prompt": f"Say {n}.", "completion": f"m{n}", "difficulty": 100 + n} for n in range(30)]
    return [write("alpaca.jsonl", alpaca), write("said.jsonl", texts)]


def test_numbers_stay_beside_the_rows_of_each_source(arguments, write, encoder):
    made = prepare(
        **arguments(
            train=graded(write), weights=[1.0, 1.0], numbers=("difficulty",), eval_fraction=0.1, max_length=64
        )
    )
    found = []
    for split in made.values():
        for row in load(split).to_list():
            said = encoder().tokenizer.decode(
                [t for t in row["labels"] if t != -100], skip_special_tokens=True
            )
            found.append((said.strip(), row["difficulty"]))
    assert sorted(found) == sorted(
        [(f"a{n}", float(n)) for n in range(20)] + [(f"m{n}", 100.0 + n) for n in range(20)]
    )


def test_a_source_without_the_number_is_refused_with_its_place(arguments, two, write):
    problems = refusal(arguments(train=[graded(write)[1], two[1]], numbers=("difficulty",)))
    assert problems[0].key == f"{two[1]}:1" and "`difficulty` is missing" in problems[0].why


def test_fingerprints_know_numbers_weights_and_streaming(arguments, write):
    given = arguments(train=graded(write))
    changes = ({}, {"numbers": ("difficulty",)}, {"weights": [1.0, 2.0]}, {"streaming": True})
    assert len({fingerprint(**given | change) for change in changes}) == len(changes)


@pytest.mark.parametrize("weights", [None, [3.0, 1.0], [1.0, 1.0]])
@pytest.mark.parametrize("on_too_long", ["truncate", "skip"])
def test_rows_are_counted_again_without_tokenising(arguments, write, weights, on_too_long):
    from soup.data.settings import Settings
    from soup.data.sources import count

    rows = [{"text": "a"}, {"text": 3}, {"text": "long " * 300}, {"text": "b"}] * 5
    files = [write("one.jsonl", rows), write("other.jsonl", rows)]
    given = arguments(
        train=files, shape="text", weights=weights, on_bad_row="skip", on_too_long=on_too_long, max_length=64
    )
    report = prepare(**given)["train"].report
    made = count(Settings(**given), "train")
    assert [(examples, tally.bad_total) for examples, tally in made] == [(15, 5), (15, 5)]
    left = 10 if on_too_long == "skip" else 15
    (examples, tally), ended = made[0], report.sources[0]  # the source that ends a mix is read whole
    assert examples - (ended["lost"] - tally.bad_total) == left == ended["rows"]


def test_the_sample_of_lengths_has_the_shares(arguments, write):
    short, long = (
        write("short.jsonl", [{"text": "a"}] * 4000),
        write("long.jsonl", [{"text": "b " * 20}] * 6000),
    )
    sample = lengths(**arguments(train=[short, long], shape="text"))["train"].lengths["sample"]
    assert sample == sorted(sample) and len(sample) == 1000
    assert sample.count(sample[0]) == pytest.approx(400, abs=5)


def test_measured_lengths_are_those_of_the_mix(arguments, write):
    short = write("short.jsonl", [{"text": "a"}] * 30_00)
    long = write("long.jsonl", [{"text": "long " * 20}] * 9000)
    for weights, rows in ((None, 12000), ([1.0, 1.0], 6000), ([1.0, 9.0], 10000)):
        given = arguments(train=[short, long], shape="text", weights=weights)
        measured, whole = lengths(**given)["train"], prepare(**given)["train"].report
        assert measured.sampled and not whole.sampled and whole.rows == rows
        assert measured.rows == pytest.approx(rows, rel=0.02)
        assert measured.lengths["mean"] == pytest.approx(whole.lengths["mean"], rel=0.02)
        assert measured.lengths["sum"] == pytest.approx(whole.lengths["sum"], rel=0.02)
        assert measured.lengths["p50"] == whole.lengths["p50"] or weights == [1.0, 1.0]
        wanted = [source["rows"] for source in whole.sources]
        assert [source["rows"] for source in measured.sources] == pytest.approx(wanted, rel=0.02)


def test_what_is_held_out_is_the_share_of_each_source(arguments, two):
    given = arguments(train=two, weights=[3.0, 1.0], eval_fraction=0.1)
    made = prepare(**given)
    assert [source["rows"] for source in made["eval"].report.sources] == [6, 2]
    assert Counter(made["train"].sources().tolist()) == {0: 54, 1: 18}
    rows = [tuple(ids) for split in made.values() for ids in load(split)["input_ids"]]
    whole = load(prepare(**arguments(train=two, weights=[3.0, 1.0]))["train"])["input_ids"]
    assert sorted(rows) == sorted(map(tuple, whole))


def test_the_fingerprint_knows_weights_sources_and_streaming(arguments, two, write):
    given = arguments(train=two)
    seen = {
        fingerprint(**given),
        fingerprint(**given | {"weights": [1.0, 1.0]}),
        fingerprint(**given | {"weights": [2.0, 1.0]}),
        fingerprint(**given | {"train": two[::-1]}),
        fingerprint(**given | {"streaming": True}),
    }
    assert len(seen) == 5
    write("chats.jsonl", [{"prompt": "a", "completion": "b"}])
    assert fingerprint(**given) not in seen, "the content of each source"


def test_rows_of_pairs_and_prompts_mix_too(arguments, write):
    pairs = [write(f"p{n}.jsonl", [{"prompt": f"{n}", "chosen": "b", "rejected": "c"}] * 9) for n in (0, 1)]
    made = prepare(**arguments(train=pairs, weights=[1.0, 1.0], shape="preference"))["train"]
    assert Counter(load(made)["prompt"]) == {"0": 9, "1": 9}
    asked = [
        write("q0.jsonl", [{"prompt": "a", "answer": 1}] * 4),
        write("q1.jsonl", [{"prompt": "b", "hint": "x"}] * 4),
    ]
    made = load(prepare(**arguments(train=asked, shape="prompt"))["train"])
    assert made["answer"] == [1] * 4 + [None] * 4 and made["hint"] == [None] * 4 + ["x"] * 4


@pytest.mark.parametrize(
    ("replaced", "key", "why"),
    [
        ({"weights": [1.0]}, "data.weights", "data.train names 2"),
        ({"weights": [1.0, 0.0]}, "data.weights", "positive"),
        ({"weights": [1.0, float("inf")]}, "data.weights", "positive"),
        ({"weights": [1.0, 1.0, 1.0]}, "data.weights", "data.train names 2"),
        ({"max_samples": 10}, "data.max_samples", "have none of"),
        ({"max_samples": 1, "weights": [1.0, 1.0]}, "data.max_samples", "have none of"),
        ({"weights": [1.0, 1e-6]}, "data.weights", "before it has a row of"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(arguments, two, replaced, key, why):
    (problem,) = refusal(arguments(train=two, **replaced))
    assert problem.key == key and why in problem.why and problem.fix


def test_a_source_without_a_usable_row_is_refused_by_name(arguments, two, write):
    empty, bad = write("empty.jsonl", []), write("bad.jsonl", [{"instruction": "a", "output": ""}])
    for weights in (None, [1.0, 1.0, 1.0]):
        (problem,) = refusal(arguments(train=[*two, empty], weights=weights))
        assert (problem.key, problem.value) == ("data.train", empty) and "no row in it" in problem.why
        (problem,) = refusal(arguments(train=[*two, bad], weights=weights, on_bad_row="skip"))
        assert problem.value == bad and "no row is left of 1: 1 bad" in problem.why


def test_missing_and_doubled_sources_are_refused(arguments, two, tmp_path):
    keys = [problem.value for problem in refusal(arguments(train=[*two, "no.jsonl", "none.csv"]))]
    assert keys == ["no.jsonl", "none.csv"]
    (tmp_path / "link.jsonl").symlink_to(two[0])
    (problem,) = refusal(arguments(train=[*two, str(tmp_path / "link.jsonl")]))
    assert problem.value == two[0] and "named twice" in problem.why


def test_texts_and_messages_do_not_mix_in_pairs(arguments, write):
    texts = write("t.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
    turns = [{"role": "user", "content": "a"}]
    chats = write("c.jsonl", [{"prompt": turns, "chosen": "b", "rejected": "c"}] * 3)
    problems = refusal(arguments(train=[texts, chats], shape="preference"))
    assert "written as messages, those before it as texts" in problems[0].why


# A stream


def test_a_stream_gives_the_rows_of_the_data_and_stores_none(arguments, two):
    given = arguments(train=two, weights=[3.0, 1.0], streaming=True)
    made = prepare(**given)
    stored = load(prepare(**given | {"streaming": False})["train"]).to_list()
    stream = made["train"].stream
    assert [row for _, row in stream.once()] == stored, "token for token, mask for mask"
    assert [path.name for path in made["train"].folder.iterdir()] == ["report.json"]
    drawn = list(itertools.islice(stream.drawn(), 160))
    order = [json.dumps(row) for row in drawn]
    assert Counter(order[:80]) == Counter(order[80:]) == Counter(map(json.dumps, stored)), "two epochs"
    assert order[:80] != order[80:], "each in an order of its own"
    assert list(itertools.islice(stream.drawn(), 160)) == drawn, "each reading begins anew"
    other = prepare(**given | {"split_seed": 1})["train"].stream
    assert list(itertools.islice(other.drawn(), 80)) != drawn[:80]


def test_a_stream_is_cut_at_max_samples(arguments, two):
    stream = prepare(**arguments(train=two[1], streaming=True, max_samples=7))["train"].stream
    drawn = [json.dumps(row) for row in itertools.islice(stream.drawn(), 14)]
    assert set(drawn[:7]) == set(drawn[7:]) and len(set(drawn)) == 7


def test_the_plan_of_a_stream_reads_the_first_rows_only(arguments, write, monkeypatch):
    import soup.data.sources

    long = write("long.jsonl", [{"instruction": "a", "output": f"b{n}"} for n in range(9000)])
    real, read = soup.data.sources.read_rows, []

    def counting(files):
        for row in real(files):
            read.append(row.line)
            yield row

    monkeypatch.setattr(soup.data.sources, "read_rows", counting)
    given = arguments(train=long, streaming=True)
    report = lengths(**given)["train"]
    assert report.sampled and report.rows == 2000 and max(read) == 2001
    assert prepare(**given)["train"].report.rows == 2000 and max(read) == 2001
    whole = lengths(**given | {"train": write("short.jsonl", [{"text": "a"}] * 5)})["train"]
    assert (whole.rows, whole.sampled) == (5, False)


def test_a_stream_with_held_out_files_stores_those(arguments, two, write):
    more = write("more.jsonl", [{"instruction": "a", "output": "b"}] * 5)
    made = prepare(**arguments(train=two[0], eval=[two[1], more], streaming=True))
    assert list(made) == ["train", "eval"] and len(load(made["eval"])) == 105
    assert made["eval"].stream is None and not made["train"].open().exists()


def test_a_stream_is_refused_at_the_row_that_is_wrong(arguments, tmp_path):
    good = json.dumps({"instruction": "a", "output": "b"})
    file = tmp_path / "late.jsonl"
    file.write_text("\n".join([good] * 3000 + ["{"] + [good] * 3000))
    given = arguments(train=str(file), streaming=True)
    stream = prepare(**given)["train"].stream
    rows = stream.drawn()
    assert len(list(itertools.islice(rows, 1500))) == 1500
    with pytest.raises(Refused) as refused:
        list(itertools.islice(rows, 1000))
    assert refused.value.problems[0].key == f"{file}:3001"
    skipping = prepare(**given | {"on_bad_row": "skip"})["train"].stream
    assert sum(1 for _ in skipping.once()) == 6000
