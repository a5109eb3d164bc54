"""Training on parts of rows: what one process would log, with 2, 3 and 4 of them."""

from __future__ import annotations

import json

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
}
MORE = {
    "weights cut too": (2, 2, ("distributed=fsdp_full_shard", "lora=none")),
    "two rings": (4, 2, ("training.gradient_checkpointing=true", "training.gradient_accumulation_steps=2")),
    "contiguous, odd lengths": (2, 2, ("data.max_length=101", "longctx.ring_layout=contiguous")),
    "ZeRO-2": (2, 2, ("distributed=zero2", "lora=none")),
    "ZeRO-3": (2, 2, ("distributed=zero3", "lora=none")),
    "four in a ring": (4, 4, ("task=pretrain", "training.packing=true", "optim=muon", "lora=none")),
}


@pytest.fixture
def losses(together, tree, tmp_path):
    def logged(size, *words):
        """What each process logs."""
        answers = together("train", size, tree=tree(*SHARED, *words), folder=str(tmp_path / str(size)))
        found = []
        for history, wrong in answers:
            assert wrong == {}
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


@pytest.mark.parametrize(
    ("processes", "size", "words"),
    [pytest.param(*case, id=name) for name, case in CASES.items()]
    + [pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in MORE.items()],
)
def test_it_learns_what_one_process_learns(losses, processes, size, words):
    """To 2e-5 of losses and gradient norms in float32: sums are made in another order."""
    replicas = processes // size
    batch = [f"training.batch_size={4 * replicas}"] if replicas > 1 else []
    (alone,) = losses(
        1, *(word for word in words if "distributed" not in word and "ring" not in word), *batch
    )
    for logged in losses(processes, *ring(processes, size), *words):
        assert logged == pytest.approx(alone, rel=2e-5)


NO_DROPOUT = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
FAMILIES = {
    "gpt2": NO_DROPOUT | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "qwen3": {"head_dim": 16, "num_key_value_heads": 2},
    "gemma": {"head_dim": 16, "num_key_value_heads": 1},
    "mixtral": {},
    "deepseek_v3": {},
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), FAMILIES.items(), ids=FAMILIES)
def test_families(losses, expert_model, kind, settings):
    words = (f"model.base={expert_model(kind, **settings)}", "task=pretrain", "training.packing=true")
    words += ("lora=none", "training.batch_size=2", "data.max_length=64")
    if kind == "mixtral":
        words += ("training.moe_aux_loss_coeff=0.0",)
    (alone,) = losses(1, *words)
    for logged in losses(2, *ring(2, 2), *words):
        assert logged == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_sixteen_bits(losses):
    """Sums of parts are rounded once more: to 1e-2."""
    words = ("model.dtype=bfloat16", "lora=none")
    (alone,) = losses(1, *words)
    for logged in losses(2, *ring(2, 2), *words):
        assert logged == pytest.approx(alone, rel=1e-2, abs=2e-2)


@pytest.mark.slow
def test_two_rings_read_the_only_row(losses):
    """Each of its processes draws it, and yet a row lies in two."""
    assert losses(4, *ring(4, 2), "data.max_samples=1", "data.eval_fraction=0.0")


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(several, place, tree, unequal, stop_at):
    words = ("task=pretrain", "training.packing=true", "training.batch_size=2", "training.max_steps=6")
    words += ("training.save_steps=2", "training.logging_steps=1", "training.eval_steps=2", "optim.lr=5e-3")
    tree = tree(*ring(2, 2), *words)
    whole, stopped = place(tree, "whole"), place(tree, "stopped")
    process = several(whole, 2)
    assert process.wait() == 0, process.stdout.read()
    assert several(stopped, 2, code=stop_at(3)).wait() == 0
    assert stopped.state() == "interrupted"
    process = several(stopped, 2)
    assert process.wait() == 0, process.stdout.read()
    assert unequal(whole, stopped) == []
    proved = json.loads(whole.effective.read_text())
    assert proved["longctx.ring_size"]["effective"] == 2
    assert [key for key, one in proved.items() if not one["ok"]] == []
