"""Sweeps on disk: the same runs are the same sweep, states come from the runs, 10,000 points are read in no time."""

import os

import pytest
from filelock import FileLock

from soup import sweep
from soup.errors import Refused
from soup.record import Run, write_json
from soup.sweep import SweepPoint

LOCAL = {"name": "local", "slots": 1, "wait": True}


@pytest.fixture
def recorded(tmp_path):
    def make(*runs, **settings):
        points = [SweepPoint(run=run, overrides=(f"lora.r={number}",)) for number, run in enumerate(runs)]
        return sweep.record(
            tmp_path, command=["-m"], settings=LOCAL | settings, objective="eval_loss", points=points
        )

    return make


def test_a_sweep_is_its_runs_and_its_launcher(recorded):
    first = recorded("a", "b")
    created = first.record()["created"]
    again = recorded("b", "a")
    assert again == first and again.record()["created"] == created
    assert recorded("a", "b", "c") != first
    assert recorded("a", "b", name="slurm") != first
    assert recorded("a", "b", slots=2) == first


def test_points_are_what_was_recorded(tmp_path):
    points = [
        SweepPoint(run="a", overrides=("x=1", "y=ü"), planned={"steps": 3}, launch={"slots": 2}),
        SweepPoint(run="b"),
    ]
    made = sweep.record(
        tmp_path,
        command=["-m", "x=1,2"],
        settings=LOCAL,
        objective="loss",
        points=points,
        invalid=[{"overrides": ["x=3"], "why": "x"}],
    )
    assert made.points() == points
    assert made.settings(points[0])["slots"] == 2 and made.settings(points[1])["slots"] == 1
    assert made.record()["invalid"] == [{"overrides": ["x=3"], "why": "x"}]


def test_states_are_those_of_the_run_folders(recorded, tmp_path):
    made = recorded("new", "finished", "interrupted", "running")
    for name in ("new", "finished", "interrupted", "running"):
        (tmp_path / name).mkdir()
    Run(tmp_path / "finished").finish("finished")
    for name in ("interrupted", "running"):
        write_json(Run(tmp_path / name).environment, {})
    with FileLock(Run(tmp_path / "running").lock_file):
        assert made.states() == {name: name for name in ("new", "finished", "interrupted", "running")}
    assert made.states()["running"] == "interrupted"


def test_a_sweep_is_found_by_its_beginning(recorded, tmp_path):
    with pytest.raises(Refused, match="there is no sweep"):
        sweep.find(tmp_path)
    first, second = recorded("a"), recorded("b")
    os.utime(first.file, (1, 1))
    assert sweep.find(tmp_path) == second
    assert sweep.find(tmp_path, first.id[:6]) == first
    with pytest.raises(Refused, match="no sweeps"):
        sweep.find(tmp_path, "zz")


def test_the_end_of_a_metrics_file(tmp_path):
    run = Run(tmp_path)
    assert sweep.last_metrics(run, "eval_loss") == {"eval_loss": None}
    lines = [f'{{"step": {n}, "loss": 1.0}}\n' for n in range(5000)]
    lines[4990] = '{"step": 4990, "eval_loss": 0.5}\n'
    run.metrics.write_text("".join(lines) + '{"step": 5')
    assert sweep.last_metrics(run, "eval_loss") == {"step": 4999, "loss": 1.0, "eval_loss": 0.5}
