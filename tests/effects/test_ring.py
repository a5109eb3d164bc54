"""What `prove` says about a ring of two processes, whole and spoilt."""

from __future__ import annotations

import pytest

RING = (
    "distributed=ddp",
    "distributed.processes=2",
    "longctx.use_ring_attention=true",
    "longctx.ring_size=2",
)
SPOILT = {
    "attention_stays_local": "longctx.use_ring_attention",
    "parts_are_averaged": "longctx.use_ring_attention",
    "gradients_of_keys_stay": "longctx.use_ring_attention",
    "transformers_drops_the_attention": "longctx.use_ring_attention",
    "rows_stay_whole": "longctx.ring_layout",
    "everyone_draws_other_rows": "longctx.ring_size",
    "another_layout": "longctx.ring_layout",
    "a_part_twice": "longctx.ring_layout",
}


@pytest.fixture
def mismatches(together, tree, tmp_path):
    def found(sabotage, *words):
        return together("prove", 2, tree=tree(*RING, *words), folder=str(tmp_path), sabotage=sabotage)

    return found


@pytest.mark.parametrize("words", [(), ("task=pretrain", "training.packing=true", "lora=none")])
def test_nothing_is_wrong(mismatches, words):
    assert mismatches("nothing", *words) == [{}, {}]


@pytest.mark.parametrize(("sabotage", "key"), SPOILT.items(), ids=SPOILT)
def test_it_is_noticed(mismatches, sabotage, key):
    for wrong in mismatches(sabotage):
        assert key in wrong
