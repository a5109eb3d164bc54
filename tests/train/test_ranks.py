"""Runs of several processes: who draws which rows, what they learn together, and what happens when one of them goes.

Every start imports torch anew in each process, so one run lives through many things.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow

TWO = ("distributed=ddp", "distributed.processes=2", "distributed.timeout_s=6")
JOB = (
    "lora.dropout=0.1",
    "training.max_steps=60",
    "training.save_steps=5",
    "training.logging_steps=1",
    "training.eval_steps=25",
    "optim.lr=1e-2",
)
ENDS_S = 60  # bound on how long ranks outlive one another, on a machine that does much else
# A library that raises in the second process, at the third optimizer step.
BROKEN = """
import os
if os.environ.get("RANK") == "1":
    import importlib.abc, sys
    class Late(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name == "soup.train.job":
                from torch.optim import AdamW
                real, steps = AdamW.step, []
                def step(self, *given, **named):
                    steps.append(1)
                    if len(steps) == 3:
                        raise ValueError("the third step fails here")
                    return real(self, *given, **named)
                AdamW.step = step
    sys.meta_path.insert(0, Late())
"""
# What dies at the very end: in the first process what follows the run's last record, in the second one Python itself.
DYING = """
import os
if os.environ.get("RANK") == "1":
    import atexit
    atexit.register(os.abort)
elif os.environ.get("RANK") == "0":
    from soup.record import Run
    finish = Run.finish
    def killed(*given, **named):
        finish(*given, **named)
        os.kill(os.getpid(), 9)
    Run.finish = killed
"""


def ranks(process):
    """The training processes below a run's own, by rank."""
    found = {}
    for child in psutil.Process(process.pid).children():
        if "RANK" in (environment := child.environ()):  # not between fork and exec
            found[int(environment["RANK"])] = child
    return found


def catches(process, number):
    """Whether a process has a handler for this signal."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1]
    return int(caught, 16) >> (number - 1) & 1


def logged(run, step):
    return lambda: max((line["step"] for line in run.lines()), default=0) >= step


def gone(processes):
    end = time.monotonic() + ENDS_S
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes):
        assert time.monotonic() < end, "a process outlives the run"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(tree, place_below, train, tmp_path_factory):
    """The run that nothing interrupts."""
    run = place_below(tmp_path_factory.mktemp("alone"), tree(*JOB, *TWO))
    status, shown = train(run)
    assert status == 0, shown + "".join(path.read_text() for path in run.folder.glob("log.*"))
    return run, shown


def test_two_processes_train_one_run(alone):
    run, shown = alone
    assert shown.count("step 1/60") == 1, "one process tells"
    assert [line["step"] for line in run.lines() if "loss" in line] == list(range(1, 61))
    effects = json.loads(run.effective.read_text())
    assert all(effect["ok"] for effect in effects.values())
    assert effects["distributed.processes"]["effective"] == 2
    assert "mean of 2 processes" in effects["distributed.name"]["how"]
    assert {path.name for path in run.last_checkpoint().glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    assert not (run.folder / ".ranks").exists()


def test_a_run_lives_through_a_killed_process_and_a_signal_and_a_dead_leader(
    alone, tree, place, start, train, until, unequal
):
    undisturbed, _ = alone
    run = place(tree(*JOB, *TWO))

    process = start(run)
    until(process, logged(run, 7))
    both = ranks(process)
    both[1].kill()
    begun = time.monotonic()
    assert process.wait(ENDS_S) == 1
    gone(both.values())
    print(f"the other ended within {time.monotonic() - begun:.1f} s")
    assert run.state() == "interrupted"
    assert run.result()["error"] == "process 2 of 2 died of SIGKILL"
    assert "died of SIGKILL" in process.stdout.read()

    process = start(run)
    until(process, logged(run, 17))
    process.send_signal(signal.SIGINT)
    assert process.wait(ENDS_S) == 130
    assert run.result()["error"] in ("stopped by SIGINT", "stopped by SIGTERM")
    assert run.last_checkpoint().name == f"checkpoint-{run.result()['step']}"

    process = start(run)
    until(process, logged(run, 32))
    both = ranks(process)
    process.kill()
    process.wait()
    gone(both.values())
    end = time.monotonic() + ENDS_S
    while run.running():  # the lock is open until the last thread is gone
        assert time.monotonic() < end, "nobody is left to hold the lock"
        time.sleep(0.05)
    assert run.state() == "interrupted"
    assert run.last_checkpoint().name == f"checkpoint-{run.result()['step']}", "they saved where they stopped"

    status, shown = train(run)
    assert status == 0, shown
    assert unequal(undisturbed, run) == []


def test_a_hanging_process_fails_the_run_in_a_bounded_time(tree, place, start, until):
    run = place(tree(*JOB, *TWO))
    process = start(run)
    until(process, logged(run, 3))
    both = ranks(process)
    both[1].suspend()
    assert process.wait(ENDS_S) == 1
    gone(both.values())
    assert run.state() == "failed"
    assert run.result()["error"] == "process 2 of 2 did not answer within distributed.timeout_s=6"


@pytest.mark.parametrize("patience", [6, 60])
def test_a_process_that_dies_before_they_meet_is_named(tree, place, start, until, patience):
    """The other one waits for it, until it gives up or is killed too."""
    run = place(tree(*JOB, *TWO, f"distributed.timeout_s={patience}"))
    process = start(run)
    until(process, lambda: len(ranks(process)) == 2)
    both = ranks(process)
    both[1].suspend()
    until(process, lambda: catches(both[0], signal.SIGTERM))
    both[1].kill()
    assert process.wait(2 * ENDS_S) == 1
    gone(both.values())
    assert run.state() == "interrupted"
    assert run.result()["error"] == "process 2 of 2 died of SIGKILL"


def sabotaged(folder, code):
    """The environment of processes that run this code first."""
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def test_processes_that_die_once_all_is_written_leave_a_finished_run(tree, place, train, tmp_path):
    run = place(tree(*JOB, *TWO, "training.max_steps=2"))
    status, shown = train(run, **sabotaged(tmp_path, DYING))
    assert status == 0, shown
    assert run.state() == "finished" and run.result()["step"] == 2
    assert list(run.model.glob("*.safetensors"))
    assert "Fatal" not in (run.folder / "log.1.txt").read_text()


def test_the_error_shown_is_that_of_the_process_that_failed_first(tree, place, train, tmp_path):
    run = place(tree(*JOB, *TWO))
    status, shown = train(run, **sabotaged(tmp_path, BROKEN))
    assert status == 1
    assert run.result()["error"] == "process 2 of 2: ValueError: the third step fails here"
    assert "in step" in run.result()["traceback"]
    assert "failed: process 2 of 2: ValueError: the third step fails here" in shown
