"""How full packed rows get, as planned, against TRL's own packing."""

from __future__ import annotations

import random

import pytest

from soup.packing import best_fit, estimate
from tests.plan.test_plan import LENGTHS, Lengths, planned

KINDS = {
    "short": lambda draw: draw.randint(5, 90),
    "long and short": lambda draw: draw.choice([draw.randint(5, 40), draw.randint(90, 128)]),
    "more than half": lambda draw: draw.randint(66, 128),
    "longer than a row": lambda draw: draw.randint(1, 700),
}


def lengths_of(kind, rows):
    draw = random.Random(kind)
    return [KINDS[kind](draw) for _ in range(rows)]


def by_trl(lengths, size=128):
    from datasets import Dataset
    from trl import pack_dataset

    return len(pack_dataset(Dataset.from_dict({"input_ids": [[1] * n for n in lengths]}), size, "bfd_split"))


@pytest.mark.parametrize("kind", KINDS)
def test_best_fit_needs_as_many_rows_as_trls(kind):
    lengths = lengths_of(kind, 400)
    assert best_fit(lengths, 128) == by_trl(lengths)


@pytest.mark.parametrize("buckets", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_from_a_sample_is_near(kind, buckets):
    lengths = sorted(lengths_of(kind, 3000))
    parts = [lengths[len(lengths) * k // buckets : len(lengths) * (k + 1) // buckets] for k in range(buckets)]
    for part in parts:
        random.Random(0).shuffle(part)
    found = estimate(lengths[::3], 3000, 128, buckets=buckets)
    assert found == pytest.approx(sum(map(by_trl, parts)), rel=0.03)


def test_rows_that_hold_one_document_each_are_planned_so(compose):
    lengths = Lengths(**vars(LENGTHS) | {"tokens": 30000, "max": 300, "mean": 300, "sample": (300,) * 100})
    found = planned(compose, "training.packing=true", "training.batch_size=10", lengths=lengths)
    assert found.steps == 10
    assert found.notes["packing"] == "about 100 rows of 512 tokens from 100 documents, 59% full"


def test_muon_keeps_half_of_adams_state_of_matrices(compose):
    adam, muon = (
        planned(compose, "lora=none", f"optim={name}").memory["optimizer"] for name in ("adamw", "muon")
    )
    matrices = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
    assert adam - muon == 4 * matrices
    adam, muon = (planned(compose, f"optim={name}").memory["optimizer"] for name in ("adamw", "muon"))
    assert muon == adam / 2
