"""`hydra/sweeper=optuna`: points follow from what others came to; a search that is killed goes on as it would have."""

import random
import signal
import time

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from soup import sweep

SPACE = (
    "-m",
    "hydra/sweeper=optuna",
    "hydra.sweeper.sampler.n_startup_trials=2",
    "optim.lr=tag(log,interval(1e-5,1e-1))",
)
STEPS = ("training.max_steps=4", "training.eval_steps=2", "training.logging_steps=1")


def trials(found):
    storage = JournalStorage(JournalFileBackend(str(found.folder / "study.log")))
    return optuna.load_study(study_name="soup", storage=storage).trials


def come_to(found):
    """Of each trial: its run, state, value and what it reported on the way."""
    return [
        (one.user_attrs["run"], one.state.name, one.value, dict(one.intermediate_values))
        for one in trials(found)
    ]


@pytest.mark.slow
def test_a_search_runs_its_points_and_goes_on_with_more(shell, state_of):
    first = shell.run(*SPACE, *STEPS, "hydra.sweeper.n_trials=3")
    assert first.status == 0, first.out
    assert "the first 2 of 3 points; the others follow from results" in first.out
    assert "3 finished; best: eval_loss" in first.out and "by eval_loss, smallest first:" in first.out
    found = sweep.find(shell.root)
    assert found.states() == dict.fromkeys((one[0] for one in come_to(found)), "finished")
    for point, (_, state, value, reported) in zip(found.points(), come_to(found), strict=True):
        assert state == "COMPLETE" and value == found.run(point).result()["eval_loss"]
        assert sorted(reported) == [2, 4]
    ended = {point.run: found.run(point).result_file.stat().st_mtime_ns for point in found.points()}

    more = shell.run(*SPACE, *STEPS, "hydra.sweeper.n_trials=4")
    assert more.status == 0, more.out
    assert state_of(more.out, found.points()[0].words) == "finished: skipped"
    assert sweep.find(shell.root) == found and len(trials(found)) == 4
    assert all(
        found.run(point).result_file.stat().st_mtime_ns == ended[point.run] for point in found.points()[:3]
    )
    assert "4 finished" in shell.ask("status").out


@pytest.mark.slow
def test_killed_at_any_moment_it_comes_to_the_same(shell, until, losses):
    words = (*SPACE, "training.max_steps=20", "training.eval_steps=5", "training.save_steps=5")
    words = (*words, "training.logging_steps=1", "hydra.sweeper.n_trials=5")
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(3):
        process = shell.begin(*words)
        time.sleep(draw.uniform(5, 25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        until(lambda: not any(sweep.Run(path.parent).running() for path in shell.root.glob("*/.lock")))
    for log in shell.root.glob("sweeps/*/study.log"):
        with log.open("ab") as file:
            file.write(b'{"op_code":4,"cut')  # in the middle of a line
    last = shell.run(*words)
    assert last.status == 0, last.out
    found = sweep.find(shell.root)
    disturbed = come_to(found), {point.run: losses(found.run(point)) for point in found.points()}

    shell.root = shell.folder / "undisturbed"
    assert shell.run(*words).status == 0
    alone = sweep.find(shell.root)
    assert (come_to(alone), {point.run: losses(alone.run(point)) for point in alone.points()}) == disturbed
    assert len(disturbed[0]) == 5


@pytest.mark.slow
def test_invalid_diverged_and_pruned_points_are_told(shell):
    """Two at a time; one threshold diverges at once, and task=ppo has no reward model."""
    words = (
        "-m",
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=6",
        "hydra.sweeper.sampler.seed=5",  # draws all kinds
        "launch.slots=2",
        "launch.invalid=skip",
        "sweep.pruner=median",
        "sweep.n_startup_trials=1",
        "task=sft,ppo",
        "optim.lr=1e-2,1e-8",
        "training.loss_watchdog=true",
        "training.loss_watchdog_patience=1",
        "training.loss_watchdog_threshold=10.0,1.0",
        "optim.warmup_ratio=0.0",
        *STEPS,
    )
    done = shell.run(*words)
    assert done.status == 1, done.out
    found = sweep.find(shell.root)
    ends = {}
    for one in trials(found):
        ends.setdefault(one.user_attrs.get("ended", "invalid"), []).append(one)
    print({end: len(which) for end, which in ends.items()})
    assert len(trials(found)) == 6
    assert all("PPO" in one.user_attrs["why"] and one.state.name == "PRUNED" for one in ends["invalid"])
    assert all(one.state.name == "PRUNED" and "above 1" in one.user_attrs["why"] for one in ends["diverged"])
    assert all(one.state.name == "COMPLETE" for one in ends["finished"])
    assert len(found.record()["invalid"]) == len(ends["invalid"])
    assert set(found.states().values()) <= {"finished", "diverged", "pruned"}
    assert set(ends) >= {"invalid", "diverged", "finished"}

    again = shell.run(*words)
    assert again.status == 1 and len(trials(found)) == 6, again.out


def test_a_search_that_contradicts_itself_is_refused(shell):
    said = shell.run(*SPACE, *STEPS, "hydra.sweeper.direction=maximize", "launch.wait=false")
    assert said.status == 2
    assert "run.objective=-eval_loss" in said.out and "launch.wait" in said.out
    planned = shell.run("plan", *SPACE, *STEPS)
    assert planned.status == 0 and planned.out.count("optim.lr=") == 2, planned.out
    assert not shell.root.exists()
