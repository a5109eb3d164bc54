"""A run whose loss goes wrong stops before the update; it keeps its last good checkpoint, or goes on from it."""

from __future__ import annotations

import json
import signal

import pytest

WATCHED = (
    "training.loss_watchdog=true",
    "training.max_steps=16",
    "training.save_steps=2",
    "training.logging_steps=1",
    "training.gradient_accumulation_steps=2",
)
# The trainer's loss from a step on: every micro-step of it, `times` processes or attempts long.
POISON = """
from transformers import Trainer
from pathlib import Path
real = Trainer.training_step
def step(self, *words, **named):
    loss = real(self, *words, **named)
    if {condition}:
        {note}
        return {loss}
    return loss
Trainer.training_step = step
"""


def poison(condition, loss, note="pass"):
    return POISON.format(condition=condition, loss=loss, note=note)


INFINITE_GRADIENT = """
from transformers import Trainer
real = Trainer._clip_grad_norm
def clip(self, model):
    if self.state.global_step == 5:
        next(p for p in model.parameters() if p.grad is not None).grad[0] = float("inf")
    return real(self, model)
Trainer._clip_grad_norm = clip
"""


@pytest.mark.parametrize(
    ("code", "words", "step", "why"),
    [
        (poison("self.state.global_step == 5", 'loss * float("nan")'), (), 6, "the loss is nan"),
        (INFINITE_GRADIENT, (), 6, "the gradient's norm is"),
        (poison("self.state.global_step == 5", "loss * 0"), (), 6, "the loss is exactly 0"),
        (
            poison("self.state.global_step >= 5", "loss + 100"),
            ("training.loss_watchdog_threshold=50", "training.loss_watchdog_patience=3"),
            8,
            "above 50 for 3 steps",
        ),
        (
            poison("self.state.global_step >= 11", "loss * 20"),
            ("training.loss_watchdog_threshold=1000", "training.loss_watchdog_patience=2"),
            13,
            "x its median",
        ),
    ],
    ids=["nan", "gradient", "zero", "threshold", "spike"],
)
def test_it_stops_and_keeps_the_last_good_checkpoint(tree, place, server, code, words, step, why):
    run = place(tree(*WATCHED, *words))
    process = server(run, code=code)
    assert process.wait() == 1
    result = run.result()
    assert result["status"] == run.state() == "diverged"
    assert why in result["error"] and result["error"].endswith(f"at step {step}")
    assert result["step"] == step - 1, "the update was not taken"
    first_bad = {8: 6, 13: 12}.get(step, step)
    assert run.last_checkpoint().name == f"checkpoint-{(first_bad - 1) // 2 * 2}"
    assert "Traceback" not in process.stdout.read()
    assert not run.model.exists()


def test_bad_steps_that_pass_do_not_stop_it(tree, place, server):
    words = ("training.loss_watchdog_threshold=50", "training.loss_watchdog_patience=3")
    run = place(tree(*WATCHED, *words))
    code = poison("self.state.global_step in (3, 4, 8, 9)", "loss + 100")
    assert server(run, code=code).wait() == 0
    assert run.state() == "finished"


def test_rollback_goes_on_from_the_good_checkpoint_at_half_the_rate(tree, place, server):
    """Both micro-steps of the seventh step poisoned, twice: two rollbacks to the sixth, then it goes through."""
    run = place(tree(*WATCHED, "training.loss_watchdog_action=rollback", "optim.scheduler=constant"))
    marks = run.folder / "poisoned"
    marks.mkdir()
    code = poison(
        f"self.state.global_step == 6 and len(list(Path({str(marks)!r}).iterdir())) < 4",
        'loss * float("nan")',
        f"Path({str(marks)!r}, str(len(list(Path({str(marks)!r}).iterdir())))).touch()",
    )
    process = server(run, code=code)
    assert process.wait() == 0, process.stdout.read()
    assert run.state() == "finished"
    assert run.result()["rollbacks"] == 2
    noted = json.loads((run.folder / "rollbacks.json").read_text())
    assert [(entry["step"], entry["checkpoint"]) for entry in noted] == [(7, "checkpoint-6")] * 2
    rates = {line["step"]: line["lr"] for line in run.lines() if "lr" in line}
    assert sorted(rates) == list(range(1, 17))
    assert rates[6] == pytest.approx(4 * rates[7]) == pytest.approx(4 * rates[16])
    assert process.stdout.read().count("back to checkpoint-6") == 2


def test_rollbacks_are_bounded(tree, place, server):
    run = place(tree(*WATCHED, "training.loss_watchdog_action=rollback"))
    process = server(run, code=poison("self.state.global_step == 6", 'loss * float("nan")'))
    assert process.wait() == 1
    assert run.state() == "diverged"
    assert len(json.loads((run.folder / "rollbacks.json").read_text())) == 3
    assert run.last_checkpoint().name == "checkpoint-6"


def test_rollback_without_a_good_checkpoint_is_diverged(tree, place, server):
    run = place(tree(*WATCHED, "training.loss_watchdog_action=rollback"))
    assert server(run, code=poison("True", 'loss * float("nan")')).wait() == 1
    assert run.state() == "diverged"
    assert not (run.folder / "rollbacks.json").exists()


@pytest.mark.slow
def test_interrupted_after_a_rollback_it_equals_one_that_was_not(tree, place, server, until, unequal):
    """The lowered rate and the watchdog's memory survive."""
    words = (*WATCHED, "training.loss_watchdog_action=rollback", "training.max_steps=24", "optim.lr=1e-3")
    ended = []
    for name in ("alone", "killed"):
        run = place(tree(*words), name)
        mark = run.folder / "poisoned"
        code = poison(
            f"self.state.global_step == 6 and not Path({str(mark)!r}).exists()",
            'loss * float("nan")',
            f"Path({str(mark)!r}).touch()",
        )
        process = server(run, code=code)
        if name == "killed":
            until(process, lambda run=run: any(line["step"] >= 11 for line in run.lines()))
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = server(run, code=code)
        assert process.wait() == 0, process.stdout.read()
        ended.append(run)
    assert unequal(*ended) == []
