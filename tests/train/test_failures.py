"""Runs that end badly say so in short, keep the whole story in their folder, and can be tried again."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

BROKEN_STEP = """
from transformers import Trainer
def step(self, *given, real=Trainer.training_step):
    if self.is_in_train:  # and not where a probe takes a step
        raise ZeroDivisionError("in the middle of a step")
    return real(self, *given)
Trainer.training_step = step
"""
DEAF = """
import trl
real = trl.SFTConfig
trl.SFTConfig = lambda real=real, **given: real(**{k: v for k, v in given.items() if k != "learning_rate"})
"""
DIVERGING = """
from transformers import Trainer
real = Trainer.training_step
Trainer.training_step = lambda self, *words, real=real: real(self, *words) * float("nan")
"""
SMALL_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"


def ended(process):
    """Exit status, and what the terminal showed."""
    status = process.wait()
    return status, process.stdout.read()


def test_what_cannot_be_built_is_refused(tree, place, server):
    run = place(tree("lora.target_modules=[nonsense]"))
    status, shown = ended(server(run))
    assert status == 2
    assert run.state() == "failed"
    assert shown.startswith("lora.target_modules=['nonsense']: not in this model")
    assert "fix: " in shown
    assert len(shown.splitlines()) == 2
    assert run.result()["error"].strip() == shown.strip()


def test_changed_inputs_are_refused_whatever_came_before(tree, place, server, tmp_path):
    rows = [{"prompt": f"{number}?", "completion": f"{number}."} for number in range(8)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = place(tree(f"data.train={file}", "training.max_steps=2"))
    run.effective.write_text("{}")  # it was built before
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    status, shown = ended(server(run))
    assert status == 2
    assert shown.startswith("data: the data changed after this run was planned")


def test_an_unexpected_error_is_short_on_screen_and_long_in_the_folder(tree, place, server):
    run = place(tree())
    status, shown = ended(server(run, code=BROKEN_STEP))
    assert status == 1
    assert "Traceback" not in shown
    assert "failed: ZeroDivisionError: in the middle of a step\n" in shown
    assert f"the traceback is in {run.folder / 'log.txt'}\n" in shown
    result = run.result()
    assert result["status"] == run.state() == "failed"
    assert result["error"] == "ZeroDivisionError: in the middle of a step"
    assert "training_step" in result["traceback"]
    assert "ZeroDivisionError" in (run.folder / "log.txt").read_text()
    assert not run.model.exists()


def test_a_package_that_is_broken_sends_to_doctor(tree, place, server):
    code = BROKEN_STEP.replace("ZeroDivisionError", "ImportError")
    status, shown = ended(server(place(tree()), code=code))
    assert status == 1 and "Traceback" not in shown
    assert "failed: ImportError: in the middle of a step\n" in shown
    assert shown.rstrip().endswith("`soup doctor` says which package is broken, and what mends it")


def test_a_setting_without_effect_stops_the_run_before_its_first_step(tree, place, server):
    run = place(tree("optim.lr=1e-3"))
    status, shown = ended(server(run, code=DEAF))
    assert status == 1
    assert "optim.lr=0.001: did not take effect" in shown
    assert run.state() == "failed"
    assert run.lines() == [] and run.last_checkpoint() is None
    proved = json.loads(run.effective.read_text())
    assert not proved["optim.lr"]["ok"]
    assert proved["optim.weight_decay"]["ok"]


def test_a_loss_that_is_no_number_is_a_diverged_run(tree, place, server):
    run = place(tree("training.logging_steps=1", "training.max_steps=3"))
    status, shown = ended(server(run, code=DIVERGING))
    assert status == 1, shown
    assert run.state() == "diverged"
    assert run.result()["error"].startswith("the loss is nan at step")
    assert not run.model.exists()


def test_a_full_disk_is_named_and_the_run_goes_on_where_it_was(tree, place, server, unequal, whole):
    """A limit on the size of files stands for the disk: weights fit, the optimizer's state does not."""
    words = ("training.max_steps=8", "training.save_steps=3", "training.logging_steps=1", "lora=none")
    run = place(tree(*words))
    status, shown = ended(server(run, code=SMALL_FILES.format(500_000)))
    assert status == 1
    assert "Traceback" not in shown
    assert "checkpoint-3 cannot be written" in shown
    assert "MiB are free" in shown
    assert run.state() == "failed"
    assert whole(run) == []
    assert not (run.checkpoints / ".partial").exists(), "what was written in part takes no space"

    again, undisturbed = server(run), place(tree(*words), "undisturbed")
    assert again.wait() == 0, again.stdout.read()
    assert server(undisturbed).wait() == 0
    assert unequal(undisturbed, run) == []


def test_two_processes_for_one_run(tree, place, server, until):
    """The second waits for the first, then sees that there is nothing left to do."""
    run = place(tree("training.max_steps=60", "training.logging_steps=1"))
    first = server(run)
    until(first, lambda: run.lines())
    assert run.state() == "running"
    second, third = server(run), server(run)
    until(third, lambda: listens(third))
    third.send_signal(signal.SIGTERM)
    assert third.wait() == 130, "a wait can be ended"
    assert second.poll() is None
    assert first.wait() == 0
    assert second.wait() == 0
    assert run.state() == "finished"
    assert second.stdout.read() == ""
    assert [line["step"] for line in run.lines() if "loss" in line] == list(range(1, 61))


def listens(process):
    """Whether SIGTERM no longer just kills it (proc(5))."""
    caught = Path(f"/proc/{process.pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    return int(caught, 16) >> (signal.SIGTERM - 1) & 1


def test_proving_trains_nothing(tree, place, server):
    run = place(tree())
    status, shown = ended(server(run, "--prove"))
    assert status == 0, shown
    proved = json.loads(run.effective.read_text())
    assert all(effect["ok"] for effect in proved.values())
    assert proved["optim.lr"]["effective"] == pytest.approx(2e-4)
    assert not run.metrics.exists() and not run.model.exists() and run.result() is None
