"""Short rows first: what the trainer is seen to draw, and sabotage of it."""

from __future__ import annotations

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


def longest_first(monkeypatch):
    import soup.train.build as build

    real = build.tokens
    monkeypatch.setattr(build, "tokens", lambda file: -real(file))


def other(**changed):
    def sabotage(monkeypatch):
        import soup.train.build as build

        real = build.Curriculum
        monkeypatch.setattr(build, "Curriculum", lambda metric, **given: real(metric, **(given | changed)))

    return sabotage


@pytest.mark.parametrize(
    ("sabotage", "key"),
    [
        (no_sampler, "training.curriculum"),
        (theirs, "training.curriculum"),
        (longest_first, "training.curriculum_metric"),
        (other(buckets=1), "training.curriculum_buckets"),
        (other(buckets=20), "training.curriculum_buckets"),
        (other(seed=5), "training.data_seed"),
    ],
)
def test_a_curriculum_that_was_dropped(build, wrong, monkeypatch, sabotage, key):
    sabotage(monkeypatch)
    assert key in wrong(build(*ON))


def test_a_curriculum_that_was_not_asked_for(build, wrong):
    from soup.train.curriculum import Curriculum, tokens

    built = build()
    built.trainer.curriculum = Curriculum(tokens(built.prepared["train"].open()), buckets=4, seed=42)
    assert "training.curriculum" in wrong(built)
