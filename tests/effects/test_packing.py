"""Packed rows: whole documents that do not see one another, the same losses, and no token lost."""

from __future__ import annotations

import json

import pytest

PACKED = ("training.packing=true", "data.max_length=500")


@pytest.fixture
def texts(tmp_path):
    """Documents of a few tokens, and one that is longer than a row."""
    words = ["lamp"] * 4
    rows = [
        {"text": f"The keeper, page {number}. " + " ".join(words * (number % 5 + 1))} for number in range(40)
    ]
    rows.append({"text": "A long night. " * 200})
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.train={file}"


@pytest.mark.parametrize("lora", ["lora", "none"])
def test_conversations_are_packed_whole(build, wrong, lora):
    from soup import effects

    built = build(*PACKED, f"lora={lora}")
    assert wrong(built) == {}
    rows = built.trainer.train_dataset
    assert len(rows) < built.prepared["train"].report.rows * 0.8
    assert sum(map(sum, rows["seq_lengths"])) == built.prepared["train"].report.lengths["sum"]
    proved = {effect.key: effect for effect in effects.prove(built)}
    assert proved["training.packing"].effective is True
    assert (
        "documents" in proved["training.packing"].how
        and "of the others by 0" in proved["training.packing"].how
    )
    assert proved["task.name"].ok, "the packed loss is that of the documents one by one"


def test_long_documents_are_cut_and_nothing_of_them_is_lost(build, wrong, texts):
    built = build(*PACKED, "task=pretrain", texts, "data.max_length=200")
    assert wrong(built) == {}
    rows = built.trainer.train_dataset
    assert max(map(len, rows["input_ids"])) == 200
    assert sum(map(len, rows["input_ids"])) == built.prepared["train"].report.lengths["sum"]
    end = built.tokenizer.eos_token_id
    assert sum(ids.count(end) for ids in rows["input_ids"]) == 41, "a separator after each document"


@pytest.mark.parametrize("words", ["data.max_samples=20", "data.eval_fraction=0.2", "data.max_samples=41"])
def test_rows_are_counted_before_they_are_packed(build, wrong, texts, words):
    assert wrong(build(*PACKED, "task=pretrain", texts, "data.max_length=60", words)) == {}


def test_steps_are_as_planned(build, texts):
    from soup import schema
    from soup.device import resolve
    from soup.effects.optimizer import max_steps
    from soup.model import source
    from soup.plan import Lengths, plan

    words = (
        "task=pretrain",
        texts,
        *PACKED,
        "data.max_length=200",
        "training.max_steps=null",
        "training.epochs=3",
    )
    built = build(*words)
    found = built.prepared["train"].report.lengths
    lengths = Lengths(
        rows=41,
        mean=found["mean"],
        p50=found["p50"],
        p95=found["p95"],
        max=found["max"],
        tokens=found["sum"],
        learnt=found["sum_labels"],
        sampled=False,
        eval_rows=0,
        sample=tuple(found["sample"]),
    )
    config = schema.check(built.config.tree)
    planned = plan(config, model=source.config(built.model_folder), device=resolve("cpu"), lengths=lengths)
    assert planned.steps == pytest.approx(max_steps(built.trainer), rel=0.02)
    rows = len(built.trainer.train_dataset)
    full = sum(map(len, built.trainer.train_dataset["input_ids"])) / (200 * rows)
    assert planned.notes["packing"] == f"about {rows} rows of 200 tokens from 41 documents, {full:.0%} full"


def see_one_another(built):
    real = built.trainer.data_collator

    def collate(examples):
        batch = real(examples)
        import torch

        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        return batch

    built.trainer.data_collator = collate


def lose_one(built):
    rows = built.trainer.train_dataset
    built.trainer.train_dataset = rows.select(range(len(rows) - 1))


def learn_the_prompt(built):
    rows = built.trainer.train_dataset
    built.trainer.train_dataset = rows.remove_columns("labels").add_column("labels", rows["input_ids"])


@pytest.mark.parametrize(
    ("after", "key"),
    [(see_one_another, "training.packing"), (lose_one, "data.train"), (learn_the_prompt, "data.train")],
)
def test_a_pack_that_is_spoilt_is_refused(build, wrong, after, key):
    built = build(*PACKED)
    assert wrong(built) == {}
    after(built)
    assert key in wrong(built)


def test_packing_that_was_not_asked_for_is_refused(build, wrong, monkeypatch):
    from trl import pack_dataset

    import soup.train.build

    monkeypatch.setattr(soup.train.build, "_packed", lambda rows, *_: (pack_dataset(rows, 200, "bfd"), None))
    assert "training.packing" in wrong(build())


def alone(monkeypatch):
    """A library that gives each document a row of its own."""
    import trl

    real = trl.pack_dataset

    def lonely(rows, length, way):
        from datasets import concatenate_datasets

        return concatenate_datasets([real(rows.select([place]), length, way) for place in range(len(rows))])

    monkeypatch.setattr(trl, "pack_dataset", lonely)


def first_come(monkeypatch):
    """Documents are put into the last row while they fit."""
    import trl

    def loose(rows, length, _way):
        from datasets import Dataset

        packed = []
        for row in rows:
            if not packed or len(packed[-1]["input_ids"]) + len(row["input_ids"]) > length:
                packed.append({"input_ids": [], "labels": [], "seq_lengths": []})
            for name in ("input_ids", "labels"):
                packed[-1][name] += row[name]
            packed[-1]["seq_lengths"].append(len(row["input_ids"]))
        return Dataset.from_list(packed)

    monkeypatch.setattr(trl, "pack_dataset", loose)


@pytest.mark.parametrize("sabotage", [alone, first_come])
def test_rows_that_are_not_packed_by_best_fit_are_refused(build, wrong, monkeypatch, sabotage):
    sabotage(monkeypatch)
    found = wrong(build(*PACKED, "data.max_samples=60"))
    assert set(found) == {"training.packing"} and "best fit needs" in found["training.packing"].how
