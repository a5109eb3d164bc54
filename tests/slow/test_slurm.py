"""launch=slurm on a real SLURM: sweeps of real runs, disturbed in every way, equal those that were left alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from soup.record import Run

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[2]
# Waits rather than computes, so that a run lasts long enough to be disturbed and leaves the cores to the others.
REWARD = """\
import time

def patient(prompts, completions, **columns):
    time.sleep(0.25)
    return [float(len(set(answer[0]["content"]))) for answer in completions]
"""
SAVE_STEPS = 10
LONG = (
    "task=grpo",
    "task.max_completion_length=4",
    "training.max_steps=100",
    f"training.save_steps={SAVE_STEPS}",
    "training.logging_steps=1",
    "training.eval_steps=1000",
    "data.max_samples=16",
)
# The first point's loss is above the threshold from its first step: it diverges.
SWEEP = ("training.loss_watchdog=true", "training.loss_watchdog_patience=2", "training.logging_steps=1")
THRESHOLDS = ("0.5", "1000.0")
GRID = ("--multirun", *SWEEP, f"training.loss_watchdog_threshold={','.join(THRESHOLDS)}")
WAIT_S = 150
NO_END = {"PENDING", "RUNNING", "REQUEUED"}


class Soup:
    """soup as a user has it: a checkout of its own, which a test may edit, and a folder of runs."""

    def __init__(self, folder: Path, cluster, model: Path):
        self.cluster, self.model, self.checkout = cluster, model, folder / "checkout"
        for name in ("soup", "conf", "launchers"):
            shutil.copytree(
                CHECKOUT / name, self.checkout / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        (self.checkout / "reward.py").write_text(REWARD)

    def words(self, root: str, *words: str) -> list[str]:
        return [
            "launch=slurm",
            "launch.device=cpu",
            "launch.cpus=1",
            "launch.partition=low",
            "model=hub",
            f"model.base={self.model}",
            "data.max_length=128",
            "data.num_proc=1",
            "training.batch_size=4",
            "training.max_steps=4",
            f"run.root={self.checkout / root}",
            *words,
        ]

    def start(self, root: str, *words: str, path: str = "", command: tuple[str, ...] = ()):
        environment = os.environ | self.cluster.environment
        environment["PATH"] = f"{path}:{environment['PATH']}" if path else environment["PATH"]
        return subprocess.Popen(
            [sys.executable, "-m", "soup", *command, *self.words(root, *words)],
            cwd=self.checkout,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, root: str, *words: str, status: int = 0, **options) -> str:
        """Runs a command to its end, with that exit status; returns what it said."""
        process = self.start(root, *words, **options)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == status, said
        return said

    def command(self, name: str, root: str, *words: str) -> str:
        """`soup status` and its like."""
        return subprocess.run(
            [sys.executable, "-m", "soup", name, *words, f"run.root={self.checkout / root}"],
            cwd=self.checkout,
            env=os.environ | self.cluster.environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def status(self, root: str) -> dict[str, str]:
        """The state of each run, by `soup status`."""
        return {
            one["run"]: one["state"] for one in json.loads(self.command("status", root, "--json"))["points"]
        }

    def runs(self, root: str) -> list[Run]:
        return sorted(
            (Run(path.parent) for path in (self.checkout / root).glob("*/config.yaml")),
            key=lambda run: run.id,
        )

    def job(self, root: str, run: Run) -> str:
        """The run's last job (`12_0`)."""
        found = []
        for path in (self.checkout / root / "sweeps").glob("*/slurm/*/submission.json"):
            record = json.loads(path.read_text())
            if run.id in record["runs"] and record["job"]:
                found.append((int(record["job"]), record["runs"].index(run.id)))
        return "{}_{}".format(*max(found))

    def until(self, condition, what: str, timeout_s: float = WAIT_S):
        end = time.monotonic() + timeout_s
        while not (found := condition()):
            assert time.monotonic() < end, f"{what} did not happen: {self.cluster.states(all_lives=True)}"
            time.sleep(0.1)
        return found

    def in_queue(self, job: str, field: str = "%T") -> str:
        """SLURM's word for a job that has not ended, or for why it waits (`%r`), or nothing."""
        lines = self.cluster.run("squeue", "-h", "-r", "-o", f"%F_%K {field}").splitlines()
        return dict(line.split() for line in lines).get(job, "")

    def ended(self, job: str) -> str:
        """Waits until SLURM has ended a job; returns what its accounts, which come some seconds later, call the end."""
        self.until(lambda: not self.in_queue(job), f"the end of {job}")
        return self.until(
            lambda: next(iter({*self.cluster.states().get(job, [])} - NO_END), ""), f"the account of {job}"
        )

    def restart(self, job: str) -> None:
        """Starts a job as soon as it waits once more."""
        self.until(lambda: self.in_queue(job) == "PENDING", f"job {job} waits again")
        self.cluster.start_now(job)

    def reached(self, run: Run, step: int) -> None:
        def there():
            assert run.state() not in ("failed", "finished"), run.result()
            lines = run.lines()
            return bool(lines) and lines[-1]["step"] >= step

        self.until(there, f"step {step} of {run.id}")


@pytest.fixture(scope="module")
def soup(cluster, tiny_model, tmp_path_factory):
    return Soup(tmp_path_factory.mktemp("user"), cluster, tiny_model)


@pytest.fixture(scope="module")
def reward(soup):
    return f"task.rewards=[{soup.checkout}/reward.py:patient]"


@pytest.fixture(scope="module")
def submitted(soup, reward):
    """What takes long, begun at once: a run that is disturbed, and one that needs more time than it has."""
    soup("disturbed", *LONG, reward, "launch.extra={nodelist:n2}")
    soup("short", *LONG, reward, "launch.extra={nodelist:n1}", "launch.time=1", "launch.grace_s=35")
    return {root: soup.runs(root)[0] for root in ("disturbed", "short")}


@pytest.fixture(scope="module")
def alone(submitted, soup, compose, place_below, server, reward):
    """The same run, here, left alone; trains while the cluster does."""
    tree = compose(*[word for word in soup.words("alone", *LONG, reward) if not word.startswith("launch")])
    run = place_below(soup.checkout / "alone", tree)
    assert run.id == submitted["short"].id == submitted["disturbed"].id
    process = server(run)
    return lambda: (process.wait(240), run)[1]


@pytest.fixture(scope="module")
def begun(submitted, soup, cluster, tmp_path_factory):  # noqa: ARG001
    """A sweep whose submitting process died as soon as SLURM had the jobs; the checkout is edited before they start.

    Its jobs, and the file that is to be put back.
    """
    tmp_path = tmp_path_factory.mktemp("bin")
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@" && kill -9 $PPID\n')
    sbatch.chmod(0o755)
    soup("sweep", *GRID, "launch.extra={begin: now+60}", path=str(tmp_path), status=-9)
    source = soup.checkout / "soup/train/__main__.py"
    unedited = source.read_text()
    again = soup("sweep", *GRID)
    assert "0 submitted, 2 in the queue already" in again
    source.write_text("raise SystemExit('the edited checkout ran')\n")
    queued = cluster.run("squeue", "-h", "-r", "-o", "%j %F_%K").splitlines()
    (record,) = (soup.checkout / "sweep/sweeps").glob("*/sweep.json")
    (name,) = {line.split()[0] for line in queued if record.parent.name in line}
    jobs = [line.split()[1] for line in queued if line.startswith(name)]
    assert len(jobs) == 2
    cluster.start_now(jobs[0].split("_")[0])
    return jobs, source, unedited


@pytest.mark.usefixtures("begun")
def test_requeued_preempted_killed_and_its_node_restarted(submitted, alone, soup, cluster, unequal):
    run = submitted["disturbed"]
    job = soup.job("disturbed", run)
    soup.reached(run, 3)
    cluster.run("scontrol", "requeue", job)
    soup.restart(job)

    soup.reached(run, last_step(run) + 3)
    cluster.run("sbatch", "-p", "high", "-w", "n2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    soup.restart(job)

    soup.reached(run, last_step(run) + 12)
    soup.until(lambda: last_step(run) % SAVE_STEPS in (4, 5, 6), "a step without a checkpoint")
    kill_step(run)
    assert soup.ended(job) == "FAILED"
    soup.until(lambda: not run.running(), "the end of what was killed")
    assert (run.state(), run.result()) == ("interrupted", None)
    assert soup.status("disturbed") == {run.id: "failed"}
    reached = last_step(run)
    cluster.run("scontrol", "requeue", job)
    soup.restart(job)

    soup.reached(run, last_step(run) + 3)
    cluster.kill_node("n2")
    cluster.start_node("n2")
    assert soup.ended(job) == "COMPLETED"
    assert run.state() == "finished"
    assert cluster.states(all_lives=True)[job] == ["REQUEUED", "PREEMPTED", "REQUEUED", "COMPLETED"]
    assert unequal(alone(), run) == []
    requeues = json.loads((run.folder / "requeues.json").read_text())
    assert [line["restart"] for line in requeues] == [1, 2, 3]
    assert [line["stopped"] for line in requeues] == ["stopped by SIGTERM"] * 2 + ["not recorded"]
    saved = [int(line["from"].removeprefix("checkpoint-")) for line in requeues]
    assert saved[0] < saved[1] < saved[2] < reached
    assert saved[2] % SAVE_STEPS == 0


def test_a_sweep(begun, soup, tmp_path, compose, place_below, server, unequal):
    jobs, source, unedited = begun
    states = [soup.ended(job) for job in jobs]
    source.write_text(unedited)

    found = {run.tree()["training"]["loss_watchdog_threshold"]: run for run in soup.runs("sweep")}
    bad, good = (found[float(threshold)] for threshold in THRESHOLDS)
    assert (bad.state(), good.state()) == ("diverged", "finished")
    assert sorted(states) == ["COMPLETED", "FAILED"]
    told = subprocess.run(
        [sys.executable, "-m", "soup.doctor.checks", "slurm"],
        env=os.environ | soup.cluster.environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert json.loads(told)["state"] == "works" and "low* x2" in json.loads(told)["detail"], told

    tree = compose(
        *[
            word
            for word in soup.words("here", *SWEEP, "training.loss_watchdog_threshold=1000.0")
            if "launch" not in word
        ]
    )
    here = place_below(tmp_path / "here", tree)
    assert here.id == good.id
    assert server(here).wait() == 0
    assert unequal(here, good) == []

    finished = good.result_file.stat().st_mtime_ns
    said = soup("sweep", *GRID, "launch.wait=true", status=1)
    assert "1 submitted" in said and "1 done before" in said
    assert soup.status("sweep") == {bad.id: "diverged", good.id: "finished"}
    assert "eval_loss" in soup.command("logs", "sweep", good.id)
    assert bad.state() == "diverged"
    assert good.result_file.stat().st_mtime_ns == finished
    code = next((soup.checkout / "sweep/sweeps").glob("*/code/*"))
    assert json.loads((code / "environment.json").read_text())["packages"]["submitit"]


def test_cancelled_and_requeued_too_often(soup, cluster):
    soup("cancelled", "training.max_steps=5", "launch.max_requeues=0")
    (run,) = soup.runs("cancelled")
    job = soup.job("cancelled", run)
    soup.until(run.environment.exists, "the start")
    cluster.run("scontrol", "requeue", job)
    soup.restart(job)
    assert soup.ended(job) == "FAILED"
    assert run.state() == "failed"
    assert "launch.max_requeues=0" in run.result()["error"]
    assert soup.status("cancelled") == {run.id: "failed"}
    assert [line["restart"] for line in json.loads((run.folder / "requeues.json").read_text())] == [1]

    soup("cancelled", "training.max_steps=5")
    job = soup.job("cancelled", run)
    soup.until(run.running, "the start")
    assert "1 jobs cancelled" in soup.command("cancel", "cancelled")
    assert soup.ended(job) == "CANCELLED"
    assert soup.status("cancelled") == {run.id: "cancelled"}


def test_more_time_than_a_job_has(submitted, alone, soup, cluster, unequal):
    run = submitted["short"]
    job = soup.job("short", run)

    def again():
        if soup.in_queue(job, "%r") == "BeginTime":
            cluster.start_now(job)
        return not soup.in_queue(job)

    soup.until(again, "the end", 240)
    assert soup.ended(job) == "COMPLETED"
    assert run.state() == "finished"
    lives = cluster.states(all_lives=True)[job]
    assert set(lives[:-1]) == {"REQUEUED"} and lives[-1] == "COMPLETED"
    assert unequal(alone(), run) == []


def test_preempted_with_grace_then_killed_without_a_signal(submitted, alone, soup, cluster, reward, unequal):
    """In the grace period it saves and requeues itself; after SIGKILL the same command submits it once more."""
    soup.ended(soup.job("disturbed", submitted["disturbed"]))  # whose node this needs
    words = (*LONG, reward, "launch.partition=grace", "launch.extra={nodelist:n2}")
    soup("grace", *words)
    (run,) = soup.runs("grace")
    job = soup.job("grace", run)
    soup.reached(run, 3)
    begun = time.monotonic()
    cluster.run("sbatch", "-p", "high", "-w", "n2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    soup.restart(job)
    assert time.monotonic() - begun < 50, "it did not wait for the end of the grace period"

    soup.reached(run, last_step(run) + 12)
    soup.until(lambda: last_step(run) % SAVE_STEPS in (4, 5, 6), "a step without a checkpoint")
    kill_step(run)
    ended = soup.ended(job)
    assert ended in ("FAILED", "CANCELLED") and (run.state(), run.result()) == ("interrupted", None)
    assert soup.status("grace") == {run.id: ended.lower()}
    reached, kept = last_step(run), int(run.last_checkpoint().name.removeprefix("checkpoint-"))
    assert kept % SAVE_STEPS == 0 and kept < reached

    assert "1 submitted" in soup("grace", *words)
    again = soup.job("grace", run)
    assert again != job and soup.ended(again) == "COMPLETED"
    assert (run.state(), soup.status("grace")) == ("finished", {run.id: "finished"})
    assert unequal(alone(), run) == []


def last_step(run):
    lines = run.lines()
    return lines[-1]["step"] if lines else 0


def kill_step(run):
    """SIGKILL to the process that trains and to the one that watches it, which is stopped first: it would write down
    the other's end, and the other is asked to save when it dies."""
    training = int(subprocess.check_output(["pgrep", "-f", f"soup.train {run.folder}$"]))
    watching = int(subprocess.check_output(["ps", "-o", "ppid=", "-p", str(training)]))
    os.kill(watching, signal.SIGSTOP)
    for pid in (training, watching):
        os.kill(pid, signal.SIGKILL)
