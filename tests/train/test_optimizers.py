"""Every optimizer trains: the loss falls, a stopped run goes on bit for bit, and its state is what the plan counts."""

from __future__ import annotations

import json

import pytest

LEARNS = {
    "adafactor": 1e-2,
    "adamw_8bit": 5e-3,
    "lion": 1e-3,
    "schedule_free": 1e-2,
    "galore": 1e-2,
    "muon": 1e-2,
}
KNOBS = {"galore": ("optim.galore_rank=8", "optim.galore_update_proj_gap=3")}


QUICK = (("galore", "none"), ("muon", "dora"))
MORE = (
    ("adamw_8bit", "none"),
    ("adafactor", "none"),
    ("lion", "loraplus"),
    ("schedule_free", "lora"),
    ("adafactor", "lora"),
    ("adamw_8bit", "lora"),
    ("lion", "lora"),
    ("lion", "none"),
    ("adamw", "loraplus"),
    ("schedule_free", "none"),
    ("schedule_free", "loraplus"),
    ("muon", "none"),
)


@pytest.mark.parametrize(
    ("optim", "lora"), [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE)]
)
def test_it_learns_and_goes_on_bit_for_bit(server, place, tree, unequal, stop_at, optim, lora):
    tree = tree(
        f"optim={optim}",
        f"lora={lora}",
        f"optim.lr={LEARNS.get(optim, 1e-3)}",
        "optim.weight_decay=0.1",
        "training.max_steps=8",
        "training.save_steps=4",
        "training.logging_steps=1",
        "training.eval_steps=3",
        "data.eval_fraction=0.1",
        *KNOBS.get(optim, ()),
    )
    whole, stopped = place(tree, "whole"), place(tree, "stopped")
    assert server(whole).wait() == 0
    assert server(stopped, code=stop_at(3)).wait() == 130
    assert server(stopped).wait() == 0
    assert unequal(whole, stopped) == []
    logged = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
    losses = [line["loss"] for line in logged if "loss" in line]
    assert sum(losses[-2:]) < sum(losses[:2]) - 0.1


def test_galore_keeps_less_state_by_the_predicted_factor(server, place, tree):
    """Moments and projections of the two layers' linear weights, from the checkpoint's tensors."""
    import torch

    rank, layers, sides = 8, 2, ((64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64))
    run = place(tree("optim=galore", "lora=none", f"optim.galore_rank={rank}"))
    assert server(run).wait() == 0
    state = torch.load(run.last_checkpoint() / "optimizer.pt", weights_only=True)["state"].values()
    projected = [held for held in state if "projector" in held]
    assert len(projected) == layers * len(sides)
    counted = sum(held[name].numel() for held in projected for name in ("exp_avg", "exp_avg_sq"))
    assert counted == layers * sum(2 * rank * max(side) for side in sides)
    bases = sum(held["projector"]["ortho_matrix"].numel() for held in projected)
    assert bases == layers * sum(rank * min(side) for side in sides)


def test_schedule_free_saves_the_averaged_weights(server, place, tree, tmp_path):
    """The model that is saved is the average, not where the last gradient was taken; checkpoints keep that."""
    import torch
    from safetensors.torch import load_file

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}."}) + "\n" for n in range(16)))
    run = place(tree("optim=schedule_free", "optim.lr=1e-2", "training.save_steps=4", f"data.train={rows}"))
    assert server(run).wait() == 0
    last = run.last_checkpoint()
    saved, kept = (load_file(folder / "adapter_model.safetensors") for folder in (run.model, last))
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)
    assert optimizer["param_groups"][0]["train_mode"]
    beta1 = optimizer["param_groups"][0]["betas"][0]
    latest = sorted(state["z"].double().norm().item() for state in optimizer["state"].values())
    z = {}
    for name in saved:  # y = (1 - beta1) z + beta1 x
        z[name] = (kept[name].double() - beta1 * saved[name].double()) / (1 - beta1)
    assert sorted(one.norm().item() for one in z.values()) == pytest.approx(latest, rel=1e-3)
    assert any(not torch.equal(saved[name], kept[name]) for name in saved)
