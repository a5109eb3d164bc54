"""`launch=local`: a sweep is shown before it starts, runs what is not finished, and survives whatever happens to it."""

import json
import os
import random
import signal
import time

import psutil
import pytest

from soup import parents, sweep
from soup.record import Run

GRID = "optim.lr=1e-3,1e-2"
KILLS = int(os.environ.get("SOUP_KILLS", "5"))
LONG = ("training.max_steps=60", "training.logging_steps=1", "training.save_steps=5", "launch.slots=2")


def test_a_sweep_is_shown_run_repeated_and_extended(shell, state_of):
    """One bad point among three: the others finish, and the next time it is the only one that is tried."""
    key, watched = (
        "training.loss_watchdog_threshold",
        ("training.loss_watchdog=true", "training.loss_watchdog_patience=1"),
    )
    good, bad, other, new = (f"{key}={nats}" for nats in (10.0, 1.0, 20.0, 30.0))
    grid = f"{key}=10.0,1.0,20.0"
    planned = shell.run("plan", "-m", grid, *watched)
    assert [state_of(planned.out, point) for point in (good, bad, other)] == ["new"] * 3
    assert not shell.root.exists()

    first = shell.run("-m", grid, *watched, "launch.slots=2")
    assert first.status == 1, first.out
    before, _, after = first.out.partition("by eval_loss, smallest first:")
    assert before.index(other) < before.index("[1/3]"), "the table comes first"
    assert "1 of 3 points did not finish:" in after
    found = sweep.find(shell.root)
    points = {point.words: found.run(point) for point in found.points()}
    error = points[bad].result()["error"]
    assert error in after and after.index(good) < after.index(bad) and after.index(other) < after.index(bad)
    threads = {json.loads(run.environment.read_text())["threads"] for run in points.values()}
    assert threads == {max(1, len(os.sched_getaffinity(0)) // 2)}, "cores are divided by slots"

    stamps = {words: run.result_file.stat().st_mtime_ns for words, run in points.items()}
    second = shell.run("-m", f"{grid},30.0", *watched, "launch.slots=2")
    assert second.status == 1
    expected = ["finished: skipped", "diverged: tried again", "finished: skipped", "new"]
    assert [state_of(second.out, point) for point in (good, bad, other, new)] == expected
    changed = {words for words, run in points.items() if run.result_file.stat().st_mtime_ns != stamps[words]}
    assert changed == {bad}
    grown = sweep.find(shell.root)
    assert grown != found and len(grown.points()) == 4

    told = shell.ask("status")
    assert told.status == 0 and "3 finished, 1 diverged" in told.out and "no process runs it" in told.out
    assert "step 4/4" in shell.ask("logs", "1").out


@pytest.mark.slow
def test_invalid_points_stop_the_sweep_or_are_left_out(shell, state_of):
    words = ("-m", "training.neftune_alpha=5.0", "task=sft,ppo", "training.max_steps=1")
    refused = shell.run(*words)
    assert refused.status == 2
    assert state_of(refused.out, "task=ppo") == "invalid"
    assert "invalid: task=ppo: task.reward_model" in refused.out
    assert "launch.invalid=skip" in refused.out
    assert not (shell.root / "sweeps").exists()
    skipped = shell.run(*words, "launch.invalid=skip")
    assert skipped.status == 0, skipped.out
    (invalid,) = sweep.find(shell.root).record()["invalid"]
    assert invalid["overrides"] == ["task=ppo"]
    assert "1 invalid points were left out" in shell.ask("status").out


@pytest.mark.slow
def test_what_is_not_identity_is_not_trained_twice(shell):
    done = shell.run("-m", "run.name=a,b", "training.max_steps=1")
    assert done.status == 0
    assert "the same run as point 1" in done.out
    assert len(sweep.find(shell.root).points()) == 1


@pytest.mark.slow
def test_data_that_points_share_are_tokenised_once(shell, cache_folder):
    def entries():
        return {path for path in (cache_folder / "tokenised").glob("*") if path.is_dir()}

    before = entries()
    words = ("task=dpo,ipo", "optim.lr=1e-3,1e-4", "data.max_length=96", "training.max_steps=1")
    assert shell.run("-m", *words, "launch.slots=2").status == 0
    assert len(entries() - before) == 1


@pytest.mark.slow
def test_ctrl_c_stops_at_the_next_step_and_the_same_command_goes_on(shell, until, losses, state_of):
    process = shell.begin("-m", GRID, *LONG)
    runs = _running(shell, until, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, process.out.read_text()
    assert [run.state() for run in runs] == ["interrupted"] * 2
    assert all(run.last_checkpoint() for run in runs)
    assert "2 of 2 points did not finish" in process.out.read_text()

    again = shell.run("-m", GRID, *LONG)
    assert again.status == 0, again.out
    assert state_of(again.out, "optim.lr=0.001").startswith("interrupted: resumes after step")
    _equal_to_undisturbed(shell, runs, losses)


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(shell, until):
    process = shell.begin(
        "-m", GRID, "training.max_steps=100000", "training.save_steps=100000", "launch.slots=2"
    )
    _running(shell, until, process, metrics=False)
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    assert process.wait(60) == 130
    assert time.monotonic() - begun < 15


@pytest.mark.slow
@pytest.mark.timeout(300 + 60 * KILLS)
def test_killed_again_and_again(shell, until, losses):
    """SIGKILL to the parent, its fork server or a child at random moments; afterwards all is as if nothing had been."""
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    kinds, seeds = [], [0]
    for _ in range(KILLS):
        if len(_all_runs(shell)) == 2 * len(seeds) and all(
            run.state() == "finished" for run in _all_runs(shell)
        ):
            seeds.append(len(seeds))  # what is finished cannot be hurt any more
        process = shell.begin("-m", GRID, *LONG, f"training.seed={seeds[-1]}")
        time.sleep(draw.uniform(3, 25))
        kinds.append(_kill_one(process, draw))
        process.wait(120)
        until(lambda: not any(run.running() for run in _all_runs(shell)))
    print(kinds, seeds)
    words = (*LONG, f"training.seed={','.join(map(str, seeds))}")
    last = shell.run("-m", GRID, *words)
    assert last.status == 0, last.out
    _equal_to_undisturbed(shell, _all_runs(shell), losses, words)


@pytest.mark.slow
def test_two_parents_run_no_point_twice(shell):
    words = ("-m", "optim.lr=1e-3,2e-3,3e-3,4e-3", "training.max_steps=20", "training.logging_steps=1")
    first, second = shell.begin(*words), shell.begin(*words)
    assert first.wait(300) == 0, first.out.read_text()
    assert second.wait(300) == 0, second.out.read_text()
    for run in _all_runs(shell):
        assert run.state() == "finished"
        assert [line["step"] for line in run.lines() if "loss" in line] == list(range(1, 21))
        assert run.console.read_text().count("step 20/20  loss") == 1
    for process in (first, second):
        assert "did not finish" not in process.out.read_text()


@pytest.mark.slow
def test_a_detached_sweep_is_followed_cancelled_and_retried(shell, until):
    begun = shell.run("-m", GRID, *LONG[1:], "training.max_steps=400", "launch.wait=false")
    assert begun.status == 0, begun.out
    found = sweep.find(shell.root)
    assert f"`soup status {found.id}`" in begun.out
    (there,) = parents.alive(found)
    assert os.getsid(there["pid"]) == there["pid"], "the terminal may close"
    until(lambda: any(found.run(point).lines() for point in found.points()))
    told = shell.ask("status")
    assert f"process {there['pid']}" in told.out and "running" in told.out

    assert shell.run("-m", GRID, *LONG[1:], "training.max_steps=400", "launch.wait=false").status == 0
    assert parents.alive(found) == [there], "one is enough"

    follower = shell.begin("logs", "-f", tiny=False)
    stopped = shell.ask("cancel")
    assert stopped.status == 0, stopped.out
    assert parents.alive(found) == []
    assert follower.wait(60) == 0
    assert "step " in follower.out.read_text()
    assert "interrupted" in found.states().values() and "running" not in found.states().values()
    assert "interrupted" in shell.ask("status").out
    assert "nothing runs sweep" in shell.ask("cancel").out

    assert shell.ask("retry").status == 0
    until(lambda: set(found.states().values()) == {"finished"})
    until(lambda: not parents.alive(found))
    assert "by eval_loss, smallest first:" in found.log.read_text()
    assert f"all 2 points of sweep {found.id} are finished" in shell.ask("retry").out


@pytest.mark.slow
def test_unsloth_has_a_server_of_its_own(shell):
    done = shell.run("-m", "backend=transformers,unsloth", "training.max_steps=2")
    assert done.status == 0, done.out
    found = sweep.find(shell.root)
    (point,) = [point for point in found.points() if point.words == "backend=unsloth"]
    proved = json.loads(found.run(point).effective.read_text())
    assert proved["backend.name"]["effective"] == "unsloth"


def _all_runs(shell):
    return [Run(path.parent) for path in sorted(shell.root.glob("*/config.yaml"))]


def _running(shell, until, process, metrics=True):
    """The runs of a sweep of two, both of which train."""

    def both():
        runs = _all_runs(shell)
        return len(runs) == 2 and all(run.lines() if metrics else run.effective.exists() for run in runs)

    until(both, process)
    return _all_runs(shell)


def _equal_to_undisturbed(shell, runs, losses, words=LONG):
    root = shell.root
    disturbed = {run.id: losses(run) for run in runs}
    shell.root = shell.folder / "undisturbed"
    assert shell.run("-m", GRID, *words).status == 0
    assert {run.id: losses(run) for run in _all_runs(shell)} == disturbed
    shell.root = root


def _kill_one(process, draw):
    """SIGKILL to the process or to one of those below it."""
    family = [process.pid]
    for pid in family:
        try:
            with open(f"/proc/{pid}/task/{pid}/children") as file:
                family += map(int, file.read().split())
        except OSError:
            continue
    depth = draw.randrange(len(family))
    try:
        os.kill(family[depth], signal.SIGKILL)
    except ProcessLookupError:
        return "gone"
    if depth:  # a server or child: the sweep goes on with the rest, until its parent dies too
        time.sleep(draw.uniform(0, 3))
        if process.poll() is None:
            process.kill()
    return depth


@pytest.mark.slow
def test_a_run_whose_process_is_killed_says_by_what(shell, until):
    process = shell.begin("training.max_steps=5000", "training.logging_steps=1")
    until(lambda: [*shell.root.glob("*/metrics.jsonl")], process)
    (child,) = psutil.Process(process.pid).children()
    child.kill()
    assert process.wait(60) == 1
    assert (
        "interrupted; its process died of SIGKILL; the same command continues it" in process.out.read_text()
    )


@pytest.mark.slow
def test_each_slot_has_a_gpu_of_its_own(tree, place, tmp_path, monkeypatch):
    """No GPU here: the queue is shown a driver with eight, of which it may use two; its runs train on the CPU."""
    from soup import device
    from soup.cli.loader import launcher

    for number in range(8):
        (tmp_path / f"driver/{number}").mkdir(parents=True)
    monkeypatch.setattr(device, "DRIVER", tmp_path / "driver")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    (tmp_path / "look.py").write_text(
        "import os, sys, time\n"
        "def one(prompts, completions, **columns):\n"
        f"    with open('{tmp_path}/seen', 'a') as file:\n"
        "        print(os.getpid(), os.environ['CUDA_VISIBLE_DEVICES'], file=file)\n"
        "    time.sleep(0.3)\n"
        "    return [0.0] * len(prompts)\n"
    )
    words = ("task=grpo", f"task.rewards=[{tmp_path}/look.py:one]", "training.max_steps=3")
    runs = [place(tree(*words, f"training.seed={seed}")) for seed in range(4)]
    points = [sweep.SweepPoint(run=run.id) for run in runs]
    settings = {"name": "local", "device": "cuda", "slots": "auto", "wait": True}
    made = sweep.record(runs[0].folder.parent, command=[], settings=settings, objective="loss", points=points)
    said = []
    assert launcher("local").work(made, said.append) == 0
    assert set(made.states().values()) == {"finished"}, said
    seen = [line.split() for line in (tmp_path / "seen").read_text().splitlines()]
    assert {gpu for _, gpu in seen} == {"2", "5"}
    assert len({pid for pid, _ in seen}) == 4 and len({tuple(line) for line in seen}) == 4, "one GPU a run"
    # Two at a time, and never both on one: as one starts, what still looks is on the other.
    first = {pid: seen.index([pid, gpu]) for pid, gpu in seen}
    last = {pid: len(seen) - 1 - seen[::-1].index([pid, gpu]) for pid, gpu in seen}
    both = [(a, b) for a, gpu in seen for b, other in seen if a < b and gpu == other]
    assert all(last[a] < first[b] or last[b] < first[a] for a, b in both)
    assert any(first[a] < first[b] < last[a] for a, gpu in seen for b, other in seen if gpu != other)
