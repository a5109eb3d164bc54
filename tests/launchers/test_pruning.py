"""Bad points of a sweep stop at an evaluation; the sweep is done with them, and another goes on where they stopped."""

import json

import pytest

from soup import sweep

GRID = "optim.lr=1e-2,1e-8"
BAD = "optim.lr=1e-08"
STEPS = (
    "training.max_steps=8",
    "training.eval_steps=2",
    "training.logging_steps=2",
    "optim.warmup_ratio=0.0",
)
MEDIAN = ("sweep.pruner=median", "sweep.n_startup_trials=1", "sweep.n_warmup_steps=4")


@pytest.mark.slow
def test_a_bad_point_is_pruned_at_an_evaluation(shell):
    done = shell.run("-m", GRID, *STEPS, *MEDIAN)
    assert done.status == 0, done.out
    found = sweep.find(shell.root)
    good, bad = (found.run(point) for point in found.points())
    assert (good.state(), bad.state()) == ("finished", "pruned")
    result = bad.result()
    assert result["step"] == 4 and result["eval_loss"] > good.result()["eval_loss"]
    assert (
        result["error"].startswith("eval_loss ") and "at step 4 is worse than the median" in result["error"]
    )
    assert bad.last_checkpoint().name == "checkpoint-4" and not bad.model.exists()
    assert [one["pruned"] for one in json.loads((bad.folder / "pruning.json").read_text())] == [False, True]
    assert "did not finish" not in done.out and "pruned: eval_loss" in done.out
    told = shell.ask("status").out
    assert "1 finished, 1 pruned" in told and "4/8" in told and "worse than the median" in told


@pytest.mark.slow
def test_what_is_pruned_is_skipped_by_its_sweep_and_goes_on_in_another(shell, losses, state_of):
    assert shell.run("-m", GRID, *STEPS, *MEDIAN).status == 0
    found = sweep.find(shell.root)
    good, bad = (found.run(point) for point in found.points())
    ended = bad.result_file.stat().st_mtime_ns
    again = shell.run("-m", GRID, *STEPS, *MEDIAN)
    assert again.status == 0 and state_of(again.out, BAD) == "pruned: skipped"
    assert bad.result_file.stat().st_mtime_ns == ended
    assert "all 2 points" in shell.ask("retry").out

    bad.result_file.unlink()  # killed between its verdict and its end
    resumed = shell.run("-m", GRID, *STEPS, *MEDIAN)
    assert resumed.status == 0, resumed.out
    assert bad.state() == "pruned" and bad.result()["step"] == 4
    assert len(bad.lines()) == 4, "no step was taken"

    whole = shell.run("-m", GRID, *STEPS)
    assert whole.status == 0, whole.out
    assert state_of(whole.out, BAD) == "pruned: resumes after step 4"
    assert bad.state() == "finished"
    shell.root = shell.folder / "undisturbed"
    assert shell.run("-m", GRID, *STEPS).status == 0
    alone = {run.run: losses(sweep.find(shell.root).run(run)) for run in sweep.find(shell.root).points()}
    assert alone == {run.id: losses(run) for run in (good, bad)}


@pytest.mark.slow
def test_successive_halving(shell):
    words = ("-m", "optim.lr=1e-2,1e-8,1e-7,1e-4", *STEPS)
    done = shell.run(*words, "sweep.pruner=halving", "sweep.min_resource=2", "sweep.reduction_factor=2")
    assert done.status == 0, done.out
    found = sweep.find(shell.root)
    assert list(found.states().values()) == ["finished", "pruned", "pruned", "pruned"]
    steps = [found.run(point).result()["step"] for point in found.points()]
    assert steps == [8, 2, 2, 4], "of four the second best goes on to the next rung"
