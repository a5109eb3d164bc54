"""Training on parts of rows: what one process would log, with 2, 3 and 4 of them."""

from __future__ import annotations

import pytest

LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "eval_loss", "num_tokens")
SHARED = ("model.dtype=float32", "training.max_steps=3", "training.logging_steps=1", "training.eval_steps=2")
CASES = {
    "adapters": (2, 2, ()),
    "packed documents, all weights": (
        3,
        3,
        ("task=pretrain", "training.packing=true", "lora=none", "training.batch_size=2"),
    ),
    "contiguous, odd lengths": (2, 2, ("data.max_length=101", "longctx.ring_layout=contiguous")),
    "two rings": (4, 2, ("training.gradient_checkpointing=true", "training.gradient_accumulation_steps=2")),
}


@pytest.fixture
def losses(together, tree, tmp_path):
    def logged(size, *words):
        """What each process logs."""
        answers = together("train", size, tree=tree(*SHARED, *words), folder=str(tmp_path / str(size)))
        found = []
        for history, wrong in answers:
            assert {key for key in wrong if "ring" in key} == set()
            found.append(
                [
                    line[name]
                    for line in history
                    for name in LOGGED
                    if name in line and "train_loss" not in line
                ]
            )
        return found

    return logged


def ring(processes, size):
    return (
        "distributed=ddp",
        f"distributed.processes={processes}",
        "longctx.use_ring_attention=true",
        f"longctx.ring_size={size}",
    )


@pytest.mark.parametrize(("processes", "size", "words"), CASES.values(), ids=CASES)
def test_it_learns_what_one_process_learns(losses, processes, size, words):
    """To 2e-5 of losses and gradient norms in float32: sums are made in another order."""
    replicas = processes // size
    (alone,) = losses(1, *words, *([f"training.batch_size={4 * replicas}"] if replicas > 1 else []))
    for logged in losses(processes, *words, *ring(processes, size)):
        assert logged == pytest.approx(alone, rel=2e-5)
