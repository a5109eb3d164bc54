"""Short rows first: what the trainer is seen to draw, and sabotage of it."""

from __future__ import annotations

import json

import pytest

ON = ("training.curriculum=true", "training.max_steps=null", "data.max_length=400")
IDS = {
    "sft": ("input_ids",),
    "pretrain": ("input_ids",),
    **dict.fromkeys(("dpo", "ipo", "orpo", "simpo", "reward"), ("prompt_ids", "chosen_ids", "rejected_ids")),
}


def prepared_lengths(built):
    from soup.data.arrow import first

    prepared = built.prepared["train"]
    rows = first(prepared.open(), prepared.report.rows)
    return [sum(len(row[name]) for name in IDS[built.config.tree["task"]["name"]]) for row in rows]


@pytest.mark.parametrize("task", IDS)
def test_proved_in_every_task_that_has_it(build, wrong, task):
    assert wrong(build(*ON, f"task={task}")) == {}


@pytest.mark.parametrize(("task", "accumulation"), [("sft", 2), ("dpo", 1)])
def test_the_trainer_draws_short_rows_first_and_then_all(build, tmp_path, task, accumulation):
    """Rows as the collator is given them while the trainer trains, two epochs of it."""
    built = build(
        *ON,
        f"task={task}",
        "training.epochs=2",
        "training.curriculum_buckets=5",
        "data.max_samples=23",
        f"training.gradient_accumulation_steps={accumulation}",
        "data.eval_fraction=0.0",
        "training.save_steps=1000",
    )
    trainer, drawn = built.trainer, []
    rows = [repr(row) for row in trainer.train_dataset.to_list()]
    real, trainer.eval_dataset, trainer.args.eval_strategy = trainer.data_collator, None, "no"

    def seen(examples):
        drawn.extend(rows.index(repr(dict(example))) for example in examples)
        return real(examples)

    trainer.data_collator = seen
    trainer._remove_unused_columns = lambda dataset, *_, **__: dataset
    trainer.args.remove_unused_columns = False
    trainer.metrics_file = tmp_path / "metrics.jsonl"
    trainer.train()
    lengths = prepared_lengths(built)
    assert len(lengths) == 23
    first, second = drawn[:23], drawn[23:46]
    assert sorted(first) == sorted(second) == list(range(23))
    ends = [0, 5, 10, 15, 19, 23]
    parts = [[lengths[row] for row in first[a:b]] for a, b in zip(ends, ends[1:], strict=False)]
    assert all(max(one) <= min(more) for one, more in zip(parts, parts[1:], strict=False))
    assert any(part != sorted(part) for part in parts), "shuffled within"
    later = [lengths[row] for row in second]
    assert min(later[12:]) < max(later[:12]), "the second epoch is shuffled"


def no_sampler(monkeypatch):
    from transformers import Trainer

    real = Trainer._get_dataloader
    monkeypatch.setattr(
        Trainer, "_get_dataloader", lambda self, *a, **k: real(self, *a, **(k | {"sampler_fn": None}))
    )


def theirs(monkeypatch):
    from soup.train.trainer import Resumable

    monkeypatch.delattr(Resumable, "_get_train_sampler")


def reversed_metric(name):
    def sabotage(monkeypatch):
        import soup.train.build as build

        real = getattr(build, name)
        monkeypatch.setattr(build, name, lambda *given: -real(*given))

    return sabotage


def tokens_for(name):
    def sabotage(monkeypatch):
        import soup.train.build as build

        file = "open" if name == "base_loss" else None
        tokens = build.tokens
        monkeypatch.setattr(
            build, name, lambda *given: tokens(given[1].open()) / 100.0 if file else tokens(given[0])
        )

    return sabotage


def other_seed(monkeypatch):
    import soup.train.build as build

    real = build.Curriculum
    monkeypatch.setattr(build, "Curriculum", lambda *rows, **given: real(*rows, **given | {"seed": 5}))


def other_buckets(count):
    def sabotage(monkeypatch):
        import soup.train.build as build

        real = build.split
        monkeypatch.setattr(build, "split", lambda metric, _: real(metric, count))

    return sabotage


def one_loss_too_high(monkeypatch):
    """The easiest row is taken for the hardest."""
    import soup.train.build as build

    real = build.base_loss

    def wrong(*given):
        loss = real(*given).copy()
        loss[loss.argmin()] = loss.max() + 1
        return loss

    monkeypatch.setattr(build, "base_loss", wrong)


def packed_together(monkeypatch):
    """Documents of all buckets share rows, which are then cut into buckets."""
    import soup.train.build as build

    def together(dataset, config, buckets):
        from trl import pack_dataset

        rows = pack_dataset(dataset, config.data.max_length, "bfd")
        return rows, build.split(range(len(rows)), len(buckets))

    monkeypatch.setattr(build, "_packed", together)


def hard_packs_first(monkeypatch):
    import soup.train.build as build

    real = build._packed

    def hard(*given):
        rows, buckets = real(*given)
        return rows, buckets[::-1]

    monkeypatch.setattr(build, "_packed", hard)


def a_document_twice(monkeypatch):
    import soup.train.build as build

    real = build._packed
    monkeypatch.setattr(
        build, "_packed", lambda rows, *rest: real(rows.select([*range(len(rows) - 1), 0]), *rest)
    )


@pytest.mark.parametrize(
    ("sabotage", "key"),
    [
        (no_sampler, "training.curriculum"),
        (theirs, "training.curriculum"),
        (reversed_metric("tokens"), "training.curriculum_metric"),
        (other_buckets(1), "training.curriculum_buckets"),
        (other_buckets(20), "training.curriculum_buckets"),
        (other_seed, "training.data_seed"),
    ],
)
def test_a_curriculum_that_was_dropped(build, wrong, monkeypatch, sabotage, key):
    sabotage(monkeypatch)
    assert key in wrong(build(*ON))


@pytest.mark.parametrize(
    ("metric", "sabotage", "key"),
    [
        ("difficulty", reversed_metric("difficulty"), "training.curriculum_metric"),
        ("difficulty", tokens_for("difficulty"), "training.curriculum_metric"),
        ("loss", reversed_metric("base_loss"), "training.curriculum_metric"),
        ("loss", tokens_for("base_loss"), "training.curriculum_metric"),
        ("loss", one_loss_too_high, "training.curriculum_metric"),
        ("loss", no_sampler, "training.curriculum"),
        ("loss", theirs, "training.curriculum"),
        ("loss", other_seed, "training.data_seed"),
    ],
)
def test_another_metric_that_was_dropped(build, wrong, graded, monkeypatch, metric, sabotage, key):
    sabotage(monkeypatch)
    assert key in wrong(build(*ON, graded(), f"training.curriculum_metric={metric}"))


@pytest.mark.parametrize(
    ("sabotage", "key"),
    [
        (packed_together, "training.curriculum"),
        (hard_packs_first, "training.curriculum"),
        (a_document_twice, "data.train"),
        (theirs, "training.curriculum"),
        (other_buckets(2), "training.curriculum_buckets"),
        (other_seed, "training.data_seed"),
    ],
)
def test_packs_out_of_order(build, wrong, monkeypatch, sabotage, key):
    sabotage(monkeypatch)
    assert key in wrong(build(*ON, "training.packing=true"))


PAIRS = ("dpo", "ipo", "orpo", "simpo")


@pytest.fixture
def graded(tmp_path):
    """Rows with a difficulty that has nothing to do with how long they are."""

    def written(task="sft", rows=40, column="difficulty", difficulty=lambda number: (number * 7) % 11 / 2):
        text = [f"Answer {number}. " * (number % 5 + 1) for number in range(rows)]
        made = [
            {"text": text[number]}
            if task == "pretrain"
            else {"prompt": f"{number}?", "chosen": text[number], "rejected": "No."}
            if task in (*PAIRS, "reward")
            else {"prompt": f"{number}?", "completion": text[number]}
            for number in range(rows)
        ]
        file = tmp_path / f"{task}.jsonl"
        file.write_text(
            "".join(json.dumps(row | {column: difficulty(place)}) + "\n" for place, row in enumerate(made))
        )
        return f"data.train={file}"

    return written


@pytest.mark.parametrize("task", IDS)
def test_difficulty_is_proved_in_every_task_that_has_it(build, wrong, graded, task):
    built = build(*ON, f"task={task}", graded(task), "training.curriculum_metric=difficulty")
    assert wrong(built) == {}
    assert "difficulty" not in built.trainer.train_dataset.column_names
    drawn = [(row * 7) % 11 / 2 for row in list(built.trainer.curriculum)]
    edges = [0, 10, 20, 30, 40]
    parts = [drawn[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    assert all(max(one) <= min(more) for one, more in zip(parts, parts[1:], strict=False))


@pytest.mark.parametrize(
    "words",
    [
        *(f"task={task}" for task in ("sft", "pretrain", *PAIRS)),
        "task=dpo lora=none task.precompute_ref=true",
        "lora=none",
        "lora=dora training.neftune_alpha=5.0",
        "model.quantization=4bit",
        "model.quantization=8bit training.freeze_layers=1",
        "training.packing=true",
        "task=pretrain training.packing=true data.max_length=60",
        "model.dtype=bfloat16 optim=muon",
    ],
)
def test_the_base_models_loss_is_proved(build, wrong, words):
    built = build(*ON, *words.split(), "training.curriculum_metric=loss")
    assert wrong(built) == {}
    assert len(set(built.trainer.curriculum.metric_R)) > 20


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_the_losses_are_those_of_transformers(build, task):
    """Each row alone, by the loss that transformers' own class computes."""
    import torch

    from soup.data.arrow import first

    built = build(*ON, f"task={task}", "training.curriculum_metric=loss", "model.dtype=float32", "lora=none")
    prepared = built.prepared["train"]
    rows = first(prepared.open(), 12)
    for row, held in zip(rows, built.trainer.curriculum.metric_R, strict=False):
        ids = row["input_ids"] if task == "sft" else row["prompt_ids"] + row["chosen_ids"]
        labels = row["labels"] if task == "sft" else [-100] * len(row["prompt_ids"]) + row["chosen_ids"]
        with torch.no_grad():
            loss = built.model.eval()(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        assert held == pytest.approx(float(loss), rel=1e-4)


def test_the_losses_are_measured_once(build, monkeypatch):
    import soup.train.base_loss as base_loss

    one = build(*ON, "training.curriculum_metric=loss", "data.max_samples=31")
    monkeypatch.setattr(base_loss, "measure", None)
    other = build(
        *ON, "training.curriculum_metric=loss", "data.max_samples=31", "optim=lion", "training.seed=3"
    )
    assert (one.trainer.curriculum.metric_R == other.trainer.curriculum.metric_R).all()
    monkeypatch.undo()
    monkeypatch.setattr(base_loss, "_key", lambda *_: "a cache that was emptied")
    again = build(*ON, "training.curriculum_metric=loss", "data.max_samples=31")
    assert (one.trainer.curriculum.metric_R == again.trainer.curriculum.metric_R).all()
    monkeypatch.undo()
    monkeypatch.setattr(base_loss, "measure", None)
    with pytest.raises(TypeError):
        build(*ON, "training.curriculum_metric=loss", "data.max_samples=31", "model.quantization=4bit")


def test_measuring_says_how_far_it_is_and_can_be_stopped(tree, tmp_path, one_process, monkeypatch):  # noqa: ARG001
    from soup import cache, device, schema
    from soup.model import source
    from soup.train import base_loss
    from soup.train.build import build

    monkeypatch.setattr(base_loss, "SAID_S", 0.0)
    config = schema.check(tree(*ON, "training.curriculum_metric=loss", "data.max_samples=37"))
    told = []

    def stop(text):
        told.append(text)
        if len([one for one in told if not one]) == 2:
            raise InterruptedError

    where = {
        "device": device.resolve("cpu"),
        "model_folder": source.folder(config.model),
        "output": tmp_path,
    }
    before = set((cache.root() / "losses").glob("*")) if (cache.root() / "losses").is_dir() else set()
    with pytest.raises(InterruptedError):
        build(config, **where, say=stop)
    assert "measuring the base model's loss of 37 sequences" in told[0]
    assert not [one for one in set((cache.root() / "losses").glob("*")) - before if one.is_dir()]
    told.clear()
    build(config, **where, say=told.append)
    assert any("of 37 sequences measured" in text for text in told) and "nats a token" in told[-1]


def test_documents_are_packed_within_their_bucket(build, wrong):
    from soup import effects

    built = build(*ON, "training.packing=true", "training.curriculum_buckets=3")
    assert wrong(built) == {}
    parts = [list(part) for part in built.trainer.curriculum.buckets]
    lengths = [[max(built.trainer.train_dataset[int(row)]["seq_lengths"]) for row in part] for part in parts]
    shortest = [[min(built.trainer.train_dataset[int(row)]["seq_lengths"]) for row in part] for part in parts]
    assert all(max(one) <= min(more) for one, more in zip(lengths, shortest[1:], strict=False))
    assert sum(map(len, built.trainer.train_dataset["seq_lengths"])) == built.prepared["train"].report.rows
    proved = {effect.key: effect for effect in effects.prove(built)}
    assert "% full; best fit needs" in proved["training.packing"].how
    assert "documents are of one bucket" in proved["training.curriculum"].how


def test_a_curriculum_that_was_not_asked_for(build, wrong):
    from soup.train.curriculum import Curriculum, split, tokens

    built = build()
    metric = tokens(built.prepared["train"].open())
    built.trainer.curriculum = Curriculum(split(metric, 4), seed=42, metric_R=metric)
    assert "training.curriculum" in wrong(built)
