"""Two processes learn what one learns from the same rows: each way to spread a run, with adapters and all weights."""

from __future__ import annotations

import json
import signal

import pytest

SPREAD = ("ddp", "zero2", "zero3", "zero2_offload", "fsdp_full_shard", "fsdp_shard_grad", "fsdp_full_offload")
JOB = (
    "model.dtype=float32",
    "training.max_steps=20",
    "training.logging_steps=1",
    "training.eval_steps=20",
    "training.gradient_accumulation_steps=2",
    "training.max_grad_norm=0.3",
)
WEIGHTS = {
    "adapters": ("lora.r=4", "optim.lr=3e-3"),
    "all weights": ("lora=none", "optim.weight_decay=0.1", "optim.lr=3e-4"),
}
MOST = ("ddp", "zero3", "fsdp_full_shard")  # the others do with less what these do
EVERY = [
    pytest.param(
        name, task, kind, marks=[] if (name, task, kind) == ("ddp", "sft", "adapters") else pytest.mark.slow
    )
    for name in SPREAD
    for task, kind in (
        ("sft", "all weights"),
        ("dpo", "adapters"),
        *((("sft", "adapters"), ("dpo", "all weights")) if name in MOST else ()),
    )
]
TOLERANCE = 2e-4  # of losses, relative: float32 sums in another order, over 20 steps


@pytest.fixture(scope="module")
def alone(tree, place_below, server, tmp_path_factory):
    """`alone(task, kind)`: the run of one process with as many rows in a step."""
    trained = {}

    def run(task, kind):
        if (task, kind) not in trained:
            words = (*JOB, f"task={task}", *WEIGHTS[kind], "training.batch_size=4")
            trained[task, kind] = place_below(tmp_path_factory.mktemp("one"), tree(*words))
            process = server(trained[task, kind])
            assert process.wait() == 0, process.stdout.read()
        return trained[task, kind]

    return run


def told(process, run):
    notes = [json.loads(path.read_text())["traceback"] for path in (run.folder / ".ranks").glob("*.json")]
    return "\n".join(
        [process.stdout.read(), *notes, *(path.read_text() for path in run.folder.glob("log.*"))]
    )


@pytest.mark.parametrize(("name", "task", "kind"), EVERY)
def test_two_processes_learn_what_one_does(alone, tree, place, several, name, task, kind):
    import torch
    from safetensors.torch import load_file

    reference = alone(task, kind)
    words = (*JOB, f"task={task}", *WEIGHTS[kind], "training.batch_size=2", f"distributed={name}")
    run = place(tree(*words))
    process = several(run, 2)
    assert process.wait() == 0, told(process, run)

    for key in ("loss", "grad_norm", "eval_loss"):
        ours, theirs = ([line[key] for line in one.lines() if key in line] for one in (run, reference))
        assert ours == pytest.approx(
            theirs, rel=TOLERANCE if key != "grad_norm" else 20 * TOLERANCE, abs=1e-5
        ), key
    assert [line.get("tokens") for line in run.lines()] == [line.get("tokens") for line in reference.lines()]
    effects = json.loads(run.effective.read_text())
    assert all(effect["ok"] for effect in effects.values())
    assert effects["distributed.name"]["effective"] == name

    ours, theirs = (
        {name: tensor for path in one.model.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for one in (run, reference)
    )
    assert ours.keys() == theirs.keys()
    for tensor, other in ((ours[name], theirs[name]) for name in ours):
        assert tensor.dtype == other.dtype
        assert torch.allclose(tensor, other, atol=2e-3)
    _loads(run, kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "weights"),
    [
        ("qwen3_moe", "zero3", "lora=none"),
        ("olmoe", "fsdp_full_shard", "lora=none"),
        ("qwen3_moe", "zero2", "training.moe_lora=true"),
    ],
)
def test_two_processes_learn_a_mixture_of_experts_as_one_does(
    expert_model, tree, place, server, several, kind, name, weights
):
    words = (*JOB, "training.max_steps=6", f"model.base={expert_model(kind)}", weights)
    reference = place(tree(*words, "training.batch_size=4"))
    run = place(tree(*words, "training.batch_size=2", f"distributed={name}"))
    for one, process in ((reference, server(reference)), (run, several(run, 2))):
        assert process.wait() == 0, told(process, one)
    ours, theirs = ([line["loss"] for line in one.lines() if "loss" in line] for one in (run, reference))
    assert len(ours) == 6 and ours == pytest.approx(theirs, rel=TOLERANCE)
    assert all(effect["ok"] for effect in json.loads(run.effective.read_text()).values())


def _loads(run, kind):
    """The model folder loads with plain transformers or PEFT, with the weights that were saved."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    loader = AutoModelForCausalLM if kind == "all weights" else AutoPeftModelForCausalLM
    model = loader.from_pretrained(run.model, dtype=torch.float32)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.arange(8)[None]).logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3", "zero2_offload", "fsdp_full_shard"])
def test_a_stopped_run_goes_on_to_the_bit(tree, place, several, until, unequal_shares, name):
    words = (
        *JOB,
        "lora=none",
        "training.batch_size=2",
        f"distributed={name}",
        "training.save_steps=6",
        "training.max_steps=18",
    )
    undisturbed, run = place(tree(*words), "a"), place(tree(*words), "b")
    process = several(undisturbed, 2)
    assert process.wait() == 0, told(process, undisturbed)

    process = several(run, 2)
    until(process, lambda: len(run.lines()) > 7)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0, told(process, run)
    assert run.state() == "interrupted"
    assert run.result()["error"] == "stopped by SIGTERM"
    process = several(run, 2)
    assert process.wait() == 0, told(process, run)
    assert run.state() == "finished"
    assert unequal_shares(undisturbed, run) == []


@pytest.fixture(scope="module")
def unequal_shares(metrics):
    """In what two finished runs differ: metrics, weights, each process's share of the optimizer's state."""
    import torch

    def same(a, b):
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        return a == b or type(a).__name__ == type(b).__name__ == "LossScaler"

    def compared(one, other):
        found = [] if metrics(one) == metrics(other) else ["metrics"]
        for path in one.model.glob("*.safetensors"):
            if path.read_bytes() != (other.model / path.name).read_bytes():
                found.append(path.name)
        shares = sorted(path.name for path in one.last_checkpoint().glob("optimizer_*.pt"))
        assert len(shares) == 2
        for name in shares:
            held = [torch.load(run.last_checkpoint() / name, weights_only=False) for run in (one, other)]
            found += [] if same(*held) else [name]
        return found

    return compared
