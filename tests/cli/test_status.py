"""`soup status` and `logs` read files only, whoever runs the sweep, and are quick whatever its size."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest
from filelock import FileLock

from soup import parents, sweep
from soup.cli.main import main
from soup.record import Run, write_json
from soup.sweep import SweepPoint

STATES = ("finished", "failed", "interrupted", "running", "new")


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A sweep of five runs, one in each state; the lock of the running one is held."""
    monkeypatch.chdir(tmp_path)
    points = [
        SweepPoint(run=f"{number}{state}", overrides=(f"lora.r={number}",), planned={"steps": 40})
        for number, state in enumerate(STATES, 1)
    ]
    made = sweep.record(
        tmp_path / "outputs",
        command=[],
        settings={"name": "local", "wait": True, "slots": 1},
        objective="eval_loss",
        points=points,
    )
    runs = {}
    for state, point in zip(STATES, points, strict=True):
        runs[state] = run = made.run(point)
        run.folder.mkdir()
        if state == "new":
            continue
        write_json(run.environment, {})
        run.metrics.write_text(
            '{"step": 5, "loss": 2.0}\n{"step": 9, "eval_loss": 1.5}\n{"step": 10, "loss": 1.0}\n'
        )
        run.console.write_text("".join(f"step {step}/40  loss 1.0\n" for step in range(30)))
    runs["finished"].finish("finished", step=40, steps=40, loss=0.5, eval_loss=0.75)
    runs["failed"].finish("failed", error="ValueError: first line\nsecond line")
    (runs["failed"].folder / "log.txt").write_text("Traceback\nValueError: first line\n")
    (runs["interrupted"].folder / "log.txt").write_text("a line\nthe last before it was killed\n")
    with FileLock(runs["running"].lock_file):
        yield made


def shown(capsys, *argv, status=0):
    capsys.readouterr()
    assert main(argv) == status
    return capsys.readouterr().out


def test_every_state_with_its_step_objective_and_error(recorded, capsys):
    lines = shown(capsys, "status").splitlines()
    assert lines[0].endswith("1 finished, 1 failed, 1 interrupted, 1 running, 1 new")
    assert recorded.id in lines[0] and lines[1] == "no process runs it"
    told = {line.split()[2]: line for line in lines[3:]}
    assert "40/40" in told["finished"] and "0.75" in told["finished"]
    assert told["failed"].endswith("ValueError: first line")
    assert "10/40" in told["interrupted"] and told["interrupted"].endswith("the last before it was killed")
    assert "10/40" in told["running"] and "1.5" in told["running"]
    assert told["new"].split() == ["5", "lora.r=5", "new", "5new"]


def test_as_json(recorded, capsys):
    found = json.loads(shown(capsys, "status", recorded.id[:4], "--json", "run.root=outputs"))
    assert found["id"] == recorded.id and found["counts"] == dict.fromkeys(STATES, 1)
    assert [one["state"] for one in found["points"]] == list(STATES)


def test_points_wait_while_a_process_runs_the_sweep(recorded, capsys):
    with parents.registered(recorded):
        told = shown(capsys, "status")
        assert f"process {os.getpid()}" in told and "1 waiting" in told
    assert "1 new" in shown(capsys, "status")


def test_a_process_that_is_gone_does_not_run_it(recorded, capsys):
    with parents.registered(recorded):
        (own,) = json.loads(recorded.local.read_text())
    for gone in (own | {"started": own["started"] + 1}, own | {"boot": "before"}):
        write_json(recorded.local, [gone])
        assert "no process runs it" in shown(capsys, "status")
        assert "nothing runs sweep" in shown(capsys, "cancel"), "a pid that became another's is not signalled"


def test_watching_ends_with_the_last_run(recorded, capsys):
    lock = Run(recorded.root / "4running").lock_file
    lock.unlink()
    assert "no process runs it" in shown(capsys, "status", "--watch")


def test_logs_of_all_points_of_one_and_of_a_failure(recorded, capsys):
    every = shown(capsys, "logs").splitlines()
    assert len(every) == 40 and every[0] == "[1/5] step 20/40  loss 1.0"
    for named in (("3",), ("3inter",), (recorded.id, "3"), ("latest", "3")):
        assert shown(capsys, "logs", *named).splitlines() == [
            f"step {step}/40  loss 1.0" for step in range(30)
        ]
    assert "Traceback\nValueError: first line" in shown(capsys, "logs", "2")
    assert shown(capsys, "logs", "5") == ""
    assert main(["logs", "5"]) == 0
    assert "has said nothing yet; `soup status" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["status", "zz"], "no sweeps"),
        (["status", "a", "b"], "one sweep at a time"),
        (["status", "run.root=elsewhere"], "there is no sweep"),
        (["status", "-f"], "is for `logs` only"),
        (["logs", "--watch"], "is for `status` only"),
        (["logs", "9"], "no points"),
        (["logs", "latest", "zz"], "no points"),
        (["logs", "a", "b", "c"], "takes a sweep and a point"),
        (["cancel", "a", "b"], "one sweep at a time"),
        (["retry", "lora.r=3"], "no override but run.root"),
    ],
)
def test_what_cannot_be_shown_is_refused(recorded, capsys, argv, said):  # noqa: ARG001
    assert main(argv) == 2
    assert said in capsys.readouterr().err


def test_ten_thousand_points_take_under_a_second_of_this_processor(tmp_path):
    """Time of the processor, since other tests run beside this one; the command starts Python and all."""
    points = []
    for number in range(10_000):
        run = Run(tmp_path / f"{number:012x}")
        run.folder.mkdir()
        points.append(
            SweepPoint(run=run.id, overrides=(f"lora.r={number}", "optim.lr=1e-3"), planned={"steps": 400})
        )
        if number % 10 == 0:
            continue
        run.environment.write_text("{}")
        run.lock_file.touch()
        if number % 10 == 1:
            run.metrics.write_text('{"step": 5, "loss": 2.0}\n' * 100)
            continue
        status = "failed" if number % 10 == 2 else "finished"
        details = {
            "step": 400,
            "steps": 400,
            "loss": 1.0,
            "lr": 1e-4,
            "grad_norm": 1.0,
            "error": "ValueError",
        }
        run.result_file.write_text(
            json.dumps({"status": status, "eval_loss": 1.0 / number, "tokens": 10**6, **details}, indent=2)
        )
    settings = {"name": "local", "wait": True, "slots": 1}
    sweep.record(tmp_path, command=[], settings=settings, objective="eval_loss", points=points)

    def took(*words):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "soup", *words, f"run.root={tmp_path}"],
            capture_output=True,
            text=True,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    out, seconds = min((took("status") for _ in range(3)), key=lambda one: one[1])
    assert "1000 new" in out and "1000 interrupted" in out and "1000 failed" in out and "7000 finished" in out
    assert len(out.splitlines()) < 200 and "more points" in out
    assert seconds < 1.0
    assert "torch" not in _imported("status", f"run.root={tmp_path}")


def _imported(*argv):
    code = f"import sys; from soup.cli.main import main; main({list(argv)}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stderr.split()


def test_results_come_by_their_objective_and_failures_with_their_error(tmp_path):
    from soup.cli.multirun import results

    scores = {"a": 2.0, "b": float("nan"), "c": 1.0, "d": None}
    points = [SweepPoint(run=name, overrides=(f"x={name}",)) for name in (*scores, "bad")]
    made = sweep.record(
        tmp_path,
        command=[],
        settings={"name": "local", "wait": True, "slots": 1},
        objective="score",
        points=points,
        pruner={"name": "median"},
    )
    for name, score in scores.items():
        (tmp_path / name).mkdir()
        Run(tmp_path / name).finish("finished", score=score, step=3)
    (tmp_path / "bad").mkdir()
    Run(tmp_path / "bad").finish("failed", error="ValueError: why\nmore")
    said: list[str] = []
    assert results(made, said.append) == 1
    done = said[: said.index("\n1 of 5 points did not finish:")]
    assert [line.split()[0] for line in done[2:]] == ["x=c", "x=a", "x=b", "x=d"]
    assert said[-1].split(maxsplit=3) == ["x=bad", "bad", "failed", "ValueError: why"]
    Run(tmp_path / "bad").finish("pruned", score=0.5)
    said.clear()
    assert results(made, said.append) == 0
    assert [line.split()[0] for line in said[2:]] == ["x=c", "x=a", "x=b", "x=d", "x=bad"], "it went less far"
    sweep.record(tmp_path, command=[], settings=made.record()["settings"], objective="-score", points=points)
    said.clear()
    assert results(made, said.append) == 1, "without a pruner it is not done"
    assert said[0] == "\nby score, largest first:" and [line.split()[0] for line in said[2:4]] == [
        "x=a",
        "x=c",
    ]
