"""The table of reference log-probabilities: made by soup's kernels where they are on, and taken again where nothing
that it depends on has changed."""

from __future__ import annotations

import pytest
import torch

EXACT = ("model.dtype=float32", "training.batch_size=3", "task.precompute_ref=true")


def table(built):
    """The file that holds it, and its columns."""
    rows = built.trainer.train_dataset
    columns = [name for name in rows.column_names if name.startswith("ref_")]
    return rows.cache_files[-1]["filename"], {name: torch.tensor(rows[name][:]) for name in columns}


@pytest.mark.parametrize("weights", ["lora=none", "lora=dora"])
@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_it_is_made_by_the_kernels_and_is_the_stock_paths(build, monkeypatch, task, weights):
    from trl import DPOTrainer, KTOTrainer

    asked = []
    for trainer in (DPOTrainer, KTOTrainer):
        theirs = trainer.compute_ref_log_probs
        monkeypatch.setattr(
            trainer, "compute_ref_log_probs", lambda *given, theirs=theirs: asked.append(1) or theirs(*given)
        )
    file, ours = table(build(*EXACT, f"task={task}", weights))
    assert not asked
    other, stock = table(build(*EXACT, f"task={task}", weights, "backend.kernels=stock"))
    assert asked
    assert file != other
    assert ours.keys() == stock.keys() and len(ours) == 2
    for name, logp_R in ours.items():
        torch.testing.assert_close(logp_R, stock[name], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_it_is_taken_again_by_what_computes_the_same(build, wrong, task):
    words = (*EXACT, f"task={task}", "lora=none")
    file, before = table(build(*words))
    assert table(build(*words, "task.beta=0.3", "optim.lr=1e-3"))[0] == file
    scaled = build(*words, "longctx=linear", "longctx.rope_factor=4.0")
    other, after = table(scaled)
    assert other != file
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert wrong(scaled) == {}
