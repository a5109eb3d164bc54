"""Shares of several sources and rows of a stream, proved on what the trainer holds; and sabotage of both."""

from __future__ import annotations

import itertools
import json

import pytest

STREAM = ("data.streaming=true",)


@pytest.fixture
def two(tmp_path):
    """40 alpaca rows and 90 conversations."""
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    one.write_text(
        "".join(json.dumps({"instruction": f"Add {n}.", "output": f"a{n}"}) + "\n" for n in range(40))
    )
    chats = [
        [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"m{n}"}]
        for n in range(90)
    ]
    other.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return f"data.train=[{one},{other}]"


@pytest.fixture
def pairs(tmp_path):
    for name, rows in (("p", 12), ("q", 30)):
        pair = [{"prompt": f"{name}{n}", "chosen": "yes", "rejected": "no"} for n in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair))
    return f"data.train=[{tmp_path}/p.jsonl,{tmp_path}/q.jsonl]"


def proved(built):
    from soup import effects

    return {effect.key: effect for effect in effects.prove(built)}


@pytest.mark.parametrize(
    "words", [(), ("training.packing=true",), STREAM, ("data.eval_fraction=0.2",)], ids=str
)
def test_shares_are_counted_in_the_trainers_rows(build, wrong, two, words):
    built = build(two, "data.weights=[2,1]", *words)
    assert wrong(built) == {}
    how = proved(built)["data.weights"].how
    assert "rows: 40 of " in how and "20 of " in how


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        (("data.weights=[2,1]",), 60),
        (("data.weights=[1,1]",), 80),
        (("data.weights=[1,1]", "data.max_samples=21"), 21),
        (("data.weights=[1,1]", "data.max_samples=300"), 80),
        (("data.max_samples=45",), 45),
        ((), 130),
        (("data.weights=[2,1]", "data.eval_fraction=0.2", "training.packing=true"), 60),
    ],
    ids=str,
)
def test_samples_are_those_that_the_files_come_to(build, wrong, two, words, rows):
    built = build(two, *words)
    assert wrong(built) == {}
    assert proved(built)["data.max_samples"].how.startswith(f"{rows} rows were prepared; the files hold 130")


def test_skipped_and_bad_rows_of_a_mix_are_accounted_for(build, wrong, tmp_path, two):
    rows = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    for row in rows[::4]:
        row["output"] = "It is long. " * 200
    rows[1] = {"instruction": 3}
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("data.on_too_long=skip", "data.on_bad_row=skip", "data.max_length=200")
    built = build(two, "data.weights=[1,1]", *given)
    assert wrong(built) == {}
    assert built.prepared["train"].report.rows == 2 * 29


@pytest.mark.parametrize("words", [(), ("training.packing=true",)], ids=str)
def test_sources_are_sorted_by_difficulty(build, wrong, tmp_path, words):
    for name, start in (("one", 0), ("other", 7)):
        rows = [
            {"prompt": f"{name} {n}?", "completion": "yes " * (n % 5 + 1), "difficulty": start + n * 5 % 13}
            for n in range(40)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    built = build(
        f"data.train=[{tmp_path}/one.jsonl,{tmp_path}/other.jsonl]",
        "data.weights=[2,1]",
        "training.curriculum=true",
        "training.curriculum_metric=difficulty",
        *words,
    )
    assert wrong(built) == {}
    assert "difficulty" not in built.trainer.train_dataset.column_names


def fewer(monkeypatch):
    import soup.train.build

    real = soup.train.build.prepare
    monkeypatch.setattr(soup.train.build, "prepare", lambda **given: real(**given | {"max_samples": 36}))


def test_a_mix_that_is_cut_is_noticed(build, wrong, monkeypatch, two):
    fewer(monkeypatch)
    assert "data.max_samples" in wrong(build(two, "data.weights=[1,1]"))


@pytest.mark.parametrize("task", ["dpo", "kto", "reward", "grpo"])
def test_sources_of_pairs_and_prompts_mix(build, wrong, pairs, task):
    words = ("task.rewards=[length:5]",) if task == "grpo" else ()
    built = build(f"task={task}", pairs if task != "grpo" else prompts(pairs), "data.weights=[1,1]", *words)
    assert wrong(built) == {}


def prompts(pairs):
    from pathlib import Path

    for name in pairs.partition("[")[2][:-1].split(","):
        rows = [json.loads(line) for line in Path(name).read_text().splitlines()]
        Path(name).write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    return pairs


def ignoring_weights(monkeypatch):
    import soup.data.sources

    real = soup.data.sources.mixed
    monkeypatch.setattr(soup.data.sources, "mixed", lambda given, _shares: real(given, None))


def weights_dropped(monkeypatch):
    import soup.train.build

    real = soup.train.build.prepare
    monkeypatch.setattr(soup.train.build, "prepare", lambda **given: real(**given | {"weights": None}))


def equal_weights(monkeypatch):
    import soup.train.build

    real = soup.train.build.prepare
    monkeypatch.setattr(soup.train.build, "prepare", lambda **given: real(**given | {"weights": [1.0, 1.0]}))


def swapped_numbers(monkeypatch):
    import soup.data.prepare

    real = soup.data.prepare.Prepared.sources
    monkeypatch.setattr(soup.data.prepare.Prepared, "sources", lambda self: 1 - real(self))


def not_streaming(monkeypatch):
    import soup.train.build

    real = soup.train.build.prepare
    monkeypatch.setattr(soup.train.build, "prepare", lambda **given: real(**given | {"streaming": False}))


def limit_dropped(monkeypatch):
    import soup.train.build

    real = soup.train.build.prepare
    monkeypatch.setattr(soup.train.build, "prepare", lambda **given: real(**given | {"max_samples": None}))


def unshuffled(monkeypatch):
    import soup.data.stream

    monkeypatch.setattr(soup.data.stream, "shuffled", lambda rows, **_: rows)


def another_seed(monkeypatch):
    import soup.data.stream

    real = soup.data.stream.shuffled
    monkeypatch.setattr(
        soup.data.stream,
        "shuffled",
        lambda rows, buffer_rows, seed: real(rows, buffer_rows=buffer_rows, seed=seed + 1),
    )


def shuffled_by_the_loader(monkeypatch):
    from transformers import Trainer

    real = Trainer._get_dataloader

    def loader(self, dataset, description, **given):
        return real(self, dataset.shuffle(seed=1), description, **given)

    monkeypatch.setattr(Trainer, "_get_dataloader", loader)


BEFORE = {
    "a loader that ignores weights": (("data.weights=[3,1]",), ignoring_weights, "data.weights"),
    "weights dropped": (("data.weights=[3,1]",), weights_dropped, "data.weights"),
    "weights unasked": ((), equal_weights, "data.weights"),
    "other weights": (("data.weights=[3,1]",), equal_weights, "data.weights"),
    "numbers of other sources": (("data.weights=[3,1]",), swapped_numbers, "data.weights"),
    "weights of a stream dropped": ((*STREAM, "data.weights=[3,1]"), weights_dropped, "data.weights"),
    "other weights of a stream": ((*STREAM, "data.weights=[3,1]"), equal_weights, "data.weights"),
    "no stream": (STREAM, not_streaming, "data.streaming"),
    "a stream without its limit": (
        (*STREAM, "data.weights=[1,1]", "data.max_samples=9"),
        limit_dropped,
        "data.max_samples",
    ),
    "a stream in the files' order": (STREAM, unshuffled, "training.data_seed"),
    "a stream that the loader shuffles": (STREAM, shuffled_by_the_loader, "training.data_seed"),
    "a stream in another order": (STREAM, another_seed, "training.data_seed"),
}


@pytest.mark.parametrize(("words", "before", "key"), BEFORE.values(), ids=BEFORE.keys())
def test_a_loader_drops_it(build, wrong, monkeypatch, two, words, before, key):
    before(monkeypatch)
    assert key in wrong(build(two, *words))


def materialised(built):
    from datasets import Dataset

    rows = list(itertools.islice(built.trainer.train_dataset, 130))
    built.trainer.train_dataset = Dataset.from_list(rows)


def labels_of_the_prompt(built):
    built.trainer.train_dataset = built.trainer.train_dataset.map(lambda row: {"labels": row["input_ids"]})


def without_the_first(built):
    built.trainer.train_dataset = built.trainer.train_dataset.skip(1)


def larger_batches(built):
    built.trainer.args.per_device_train_batch_size = built.trainer._train_batch_size = 5


@pytest.mark.parametrize(
    ("after", "key"),
    [
        (materialised, "data.streaming"),
        (labels_of_the_prompt, "data.train"),
        (without_the_first, "training.data_seed"),
        (larger_batches, "training.batch_size"),
    ],
)
def test_a_stream_that_is_spoilt_is_refused(build, wrong, two, after, key):
    built = build(two, *STREAM)
    assert wrong(built) == {}
    after(built)
    assert key in wrong(built)


@pytest.mark.parametrize("task", ["sft", "orpo", "reward", "kto"])
def test_probes_leave_a_stream_at_its_first_row(build, wrong, task):
    built = build(f"task={task}", *STREAM)
    before = list(itertools.islice(built.trainer.train_dataset, 20))
    assert wrong(built) == {}
    loader = built.trainer.get_train_dataloader()
    first = next(iter(loader))
    again = built.trainer.data_collator(before[:4])
    name = next(name for name in first if name.endswith("input_ids"))
    assert first[name].tolist() == again[name].tolist(), "the trainer draws the first rows first"


def test_a_large_stream_is_judged_by_its_first_rows(build, wrong, tmp_path):
    for name, rows in (("a", 3000), ("b", 9000)):
        lines = [json.dumps({"instruction": f"{name}{n}", "output": "x"}) + "\n" for n in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    words = (
        f"data.train=[{tmp_path}/a.jsonl,{tmp_path}/b.jsonl]",
        "data.weights=[1,4]",
        "data.max_samples=7000",
    )
    built = build(*words, *STREAM)
    assert built.prepared["train"].report.sampled
    assert wrong(built) == {}
    assert proved(built)["data.max_samples"].how == "rows after the first 600 are not looked at"
