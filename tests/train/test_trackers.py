"""MLflow and Trackio hold what metrics.jsonl holds, in one run of theirs, whatever happens to the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("mlflow")
pytest.importorskip("trackio")

JOB = (
    "training.max_steps=16",
    "training.save_steps=4",
    "training.eval_steps=6",
    "training.logging_steps=1",
    "data.eval_fraction=0.2",
    "data.max_samples=40",
)
ALL = (
    *JOB,
    "tracking=[mlflow,trackio,tensorboard]",
    "tracking.mlflow.experiment=mine",
    "tracking.trackio.project=ours",
)
KEPT = ("loss", "lr", "grad_norm", "eval_loss")
READ = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
found = SQLiteStorage.get_logs(sys.argv[1], sys.argv[2])
print(json.dumps([found, [one["name"] for one in SQLiteStorage.get_run_records(sys.argv[1])]]))
"""


def of_mlflow(run, experiment):
    """(key, step): values, of the one run that is filed there."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.folder.parent}/mlflow.db")
    (one,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert one.info.run_name == run.id and one.data.params["lora.r"] == "16"
    found = {}
    for key in KEPT:
        for metric in client.get_metric_history(one.info.run_id, key):
            found.setdefault((key, metric.step), []).append(metric.value)
    return found, one.info.status


def of_trackio(run, project, folder):
    import json

    done = subprocess.run(
        [sys.executable, "-c", READ, project, run.id],
        env=os.environ | {"TRACKIO_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines, names = json.loads(done.stdout.splitlines()[-1])
    assert names == [run.id], "one run for the tracker as well"
    found = {}
    for line in lines:
        for key in KEPT:
            if line.get(key) is not None:
                found.setdefault((key, line["step"]), []).append(line[key])
    return found


@pytest.mark.slow
def test_several_at_once_through_a_kill_and_a_stop(tree, place, server, until, tmp_path):
    run, folder = place(tree(*ALL)), tmp_path / "trackio"
    environment = {"TRACKIO_DIR": str(folder)}
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = server(run, **environment)
        already = len(run.lines())
        until(process, lambda already=already: len(run.lines()) > max(already, 5), every_s=0.002)
        process.send_signal(number)
        process.wait()
    last = server(run, **environment)
    assert last.wait() == 0, last.stdout.read()
    right = {
        (key, line["step"]): [line[key]] for line in run.lines() for key in KEPT if line.get(key) is not None
    }
    assert {step for _, step in right} == set(range(1, 17))
    told, status = of_mlflow(run, "mine")
    assert told == right and status == "FINISHED"
    assert of_trackio(run, "ours", folder) == right
    proved = run.folder.joinpath("effective.json").read_text()
    assert '"tracking.mlflow.experiment"' in proved and "read from the open trackio" in proved


SABOTAGE = {
    "tracking.mlflow.experiment": (
        ("tracking=mlflow", "tracking.mlflow.experiment=mine"),
        "import mlflow; before = mlflow.MlflowClient.create_experiment\n"
        "mlflow.MlflowClient.create_experiment = lambda self, name, *more: before(self, 'other', *more)\n",
    ),
    "tracking.trackio.project": (
        ("tracking=trackio", "tracking.trackio.project=mine"),
        "import trackio; before = trackio.init\n"
        "trackio.init = lambda project, **more: before(project='other', **more)\n",
    ),
    "tracking.tensorboard.folder": (
        ("tracking=tensorboard", "tracking.tensorboard.folder=mine"),
        "import torch.utils.tensorboard as board; before = board.SummaryWriter\n"
        "board.SummaryWriter = lambda folder, **more: before(folder[:-4] + 'other', **more)\n",
    ),
}


@pytest.mark.parametrize("key", SABOTAGE)
def test_a_tracker_that_drops_a_setting_is_noticed(key, tree, place, server, tmp_path):
    words, code = SABOTAGE[key]
    run = place(tree(*JOB, *words))
    process = server(run, code=code, TRACKIO_DIR=str(tmp_path / "trackio"))
    assert process.wait() == 1
    assert f"{key}=mine: did not take effect: other is in force" in process.stdout.read()
    assert run.lines() == [], "before the first step"


def test_a_server_that_does_not_answer_is_refused(tree, place, server):
    run = place(tree(*JOB, "tracking=mlflow", "tracking.mlflow.uri=http://127.0.0.1:9"))
    process = server(run)
    assert process.wait() == 2
    shown = process.stdout.read()
    assert "tracking.mlflow.uri=http://127.0.0.1:9: cannot be opened" in shown and "mlflow.uri=null" in shown
