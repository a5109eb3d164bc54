"""launch=slurm over two nodes: the run of one node, whatever becomes of the other."""

import json
import os
import signal

import psutil
import pytest

from tests.slow.test_slurm import LONG, Soup, last_step

pytestmark = pytest.mark.slow

SPREAD = ("distributed=ddp", "training.max_steps=30", "distributed.timeout_s=300", "training.batch_size=2")
TWO = ("distributed.processes=1", "distributed.nodes=2")
ONE = ("distributed.processes=2", "distributed.nodes=1")


@pytest.fixture(scope="module")
def soup(cluster, tiny_model, tmp_path_factory):
    return Soup(tmp_path_factory.mktemp("nodes"), cluster, tiny_model)


@pytest.fixture(scope="module")
def submit(soup):
    """Submits the same run, spread as given, below a folder of its own."""

    def submitted(root, *spread):
        soup(root, *LONG, *SPREAD, f"task.rewards=[{soup.checkout}/reward.py:patient]", *spread)
        (run,) = soup.runs(root)
        return run, soup.job(root, run)

    return submitted


def processes(run):
    """What runs of a run's job: the processes that name its folder, and their children."""
    found = set()
    for process in psutil.process_iter():
        try:
            if str(run.folder) in process.cmdline():
                found |= {process, *process.children(recursive=True)}
        except psutil.NoSuchProcess:
            continue
    return found


def kill_node(cluster, job, name):
    """Its power fails: what runs there is gone, and SLURM finds out."""
    cluster.kill_node(name)
    number = cluster.run("squeue", "-h", "-r", "-j", job, "-o", "%A")
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if environment.get("SLURMD_NODENAME") == name and environment.get("SLURM_JOB_ID") == number:
                parent = process.parent()
                if parent is not None and parent.name().startswith("slurmstepd"):
                    parent.kill()
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    cluster.run("scontrol", "update", f"nodename={name}", "state=down", "reason=power")


def test_a_killed_process_of_the_other_node(submit, soup):
    run, job = submit("killed", *TWO)
    soup.reached(run, 2)
    (second,) = [
        one for one in processes(run) if "soup.train.rank" in one.cmdline() and one.environ()["RANK"] == "1"
    ]
    assert second.environ()["SLURMD_NODENAME"] == "n2"
    os.kill(second.pid, signal.SIGKILL)
    assert soup.ended(job) == "FAILED"
    assert (run.state(), run.result()["error"]) == ("failed", "process 2 of 2 died of SIGKILL")
    soup.until(lambda: not processes(run), "the end of all processes")


def test_two_nodes_train_the_run_of_one_when_one_fails(submit, soup, cluster, unequal):
    (run, job), (one, other) = submit("two", *TWO), submit("one", *ONE)
    assert run.id == one.id
    soup.reached(run, 12)
    kill_node(cluster, job, "n2")
    cluster.start_node("n2")
    soup.until(lambda: soup.in_queue(job) == "PENDING", "requeued")
    assert last_step(run) < 30
    back = ("sinfo", "-h", "-n", "n2", "-p", "low", "-o", "%T")
    soup.until(lambda: cluster.run(*back) in ("idle", "mixed"), "n2 is back")
    soup.restart(job)
    assert soup.ended(job) == "COMPLETED"
    assert cluster.states(all_lives=True)[job] == ["NODE_FAIL", "COMPLETED"]
    (requeue,) = json.loads((run.folder / "requeues.json").read_text())
    assert requeue["from"] == "checkpoint-10"
    effects = json.loads(run.effective.read_text())
    assert (effects["distributed.nodes"]["effective"], effects["distributed.processes"]["effective"]) == (
        2,
        1,
    )

    assert soup.ended(other) == "COMPLETED"
    assert unequal(one, run) == []
