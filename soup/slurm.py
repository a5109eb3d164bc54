"""What SLURM knows of a sweep's jobs, asked with a time limit, and what was written down when they were submitted.

A submission is a folder `<sweep>/slurm/<token>/`, whose `submission.json` is written before sbatch is called and lists
the run of each array index. The job's name leads to it, so that jobs are known by SLURM's own queue even where the
process that submitted them died before it learnt their number.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soup import sweep as sweeps
from soup.errors import Problem, Refused
from soup.record import now, read_json, tail, write_json

ASK_S = 5  # seconds that SLURM has for an answer
LOOK_S = 5  # seconds between two questions, while somebody watches
WAITING = ("PENDING", "SUSPENDED", "STOPPED", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
GOING = ("RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SIGNALING")
STOPPED = ("TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "REVOKED")

_asked: dict[Path, tuple[float, bool]] = {}


@dataclass(frozen=True)
class Submission:
    """One job array and its record."""

    folder: Path

    @property
    def name(self) -> str:
        """The job's name, which no other submission has."""
        return f"soup-{self.folder.parents[1].name}-{self.folder.name}"

    @property
    def file(self) -> Path:
        return self.folder / "submission.json"

    def record(self) -> dict[str, Any]:
        """time, runs (by array index), options, and job: SLURM's number, `None` where nobody wrote it down."""
        return read_json(self.file) or {"time": now(), "runs": [], "job": None}


@dataclass(frozen=True)
class Known:
    """What SLURM says of one run: its job (`12_3`), its state in capitals, and why it waits."""

    job: str
    state: str
    reason: str = ""

    @property
    def status(self) -> str:
        """queued, running, cancelled, failed or interrupted."""
        if self.state in WAITING:
            return "queued"
        if self.state in GOING:
            return "running"
        if self.state == "CANCELLED":
            return "cancelled"
        return "interrupted" if self.state in STOPPED else "failed"

    def __str__(self) -> str:
        return f"job {self.job}: {self.reason or self.state}"


def submissions(sweep: sweeps.Sweep) -> list[Submission]:
    """Of a sweep, the oldest first."""
    found = [Submission(path.parent) for path in (sweep.folder / "slurm").glob("*/submission.json")]
    return sorted(found, key=lambda one: one.file.stat().st_ctime_ns if one.file.exists() else 0)


def queued(root: Path) -> dict[str, Known]:
    """Of the runs below `root`, those that SLURM has a job for that has not ended, by id.

    Raises:
        Refused: SLURM does not answer.
    """
    said = _ask("squeue", "--me", "--noheader", "--array", "--format=%j|%K|%F|%T|%r")
    runs: dict[str, list[str]] = {}
    found = {}
    for line in said.splitlines():
        name, index, job, state, reason = line.strip().split("|", 4)
        if name not in runs:
            runs[name] = _runs_of(root, name)
        if runs[name] and index.isdigit():
            found[runs[name][int(index)]] = Known(f"{job}_{index}", state, "" if reason == "None" else reason)
    return found


def ended(sweep: sweeps.Sweep) -> dict[str, Known]:
    """How the last job of each run of a sweep ended, by accounting; without those it does not know.

    Raises:
        Refused: SLURM does not answer, or keeps no accounts.
    """
    every = {one.name: one.record() for one in submissions(sweep)}
    if not every:
        return {}
    since = min(one["time"] for one in every.values())[:10]
    fields = "--format=JobName,JobID,State"
    said = _ask("sacct", "-n", "-X", "-P", f"--name={','.join(every)}", f"--starttime={since}", fields)
    states = {}
    for line in said.splitlines():
        name, job, state = line.split("|", 2)
        if job.partition("_")[2].isdigit():
            states[name, int(job.partition("_")[2])] = Known(job, state.split()[0])
    found = {}
    for name, record in every.items():
        for index, run in enumerate(record["runs"]):
            if (name, index) in states:
                found[run] = states[name, index]
    return found


def tell(sweep: sweeps.Sweep, states: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """State and reason of each run that SLURM knows more of than its files, whose `states` are given.

    Raises:
        Refused: SLURM does not answer.
    """
    found = queued(sweep.root)
    if any(state in ("new", "interrupted") and run not in found for run, state in states.items()):
        with suppress(Refused):  # a cluster without slurmdbd has a queue and no accounts
            found = ended(sweep) | found
    told, done = {}, sweep.done
    for run, state in states.items():
        if state in done or run not in found:
            continue
        job = found[run]
        if job.status in ("queued", "running"):
            if state != "running":
                told[run] = (job.status, str(job))
        elif state in ("new", "interrupted") and job.state != "COMPLETED":  # of a run that was deleted since
            told[run] = (job.status, " ".join(filter(None, (str(job), _last_words(sweep, job)))))
    return told


def going(sweep: sweeps.Sweep) -> bool:
    """Whether SLURM has jobs of this sweep that have not ended; asks it every few seconds at most."""
    if not (sweep.folder / "slurm").is_dir():
        return False
    asked_s, answer = _asked.get(sweep.folder, (-ASK_S, False))
    if time.monotonic() - asked_s > LOOK_S:
        runs = {run for one in submissions(sweep) for run in one.record()["runs"]}
        try:
            answer = not runs.isdisjoint(queued(sweep.root))
        except Refused:
            answer = False
        _asked[sweep.folder] = (time.monotonic(), answer)
    return answer


def cancel(root: Path, runs: Sequence[str]) -> list[str]:
    """Cancels the jobs of these runs that SLURM has not ended; returns their numbers.

    Raises:
        Refused: SLURM does not answer.
    """
    waiting = queued(root)
    jobs = [waiting[run].job for run in runs if run in waiting]
    for batch in _batches(jobs, 500):  # a command line has an end
        _ask("scancel", *batch)
    return jobs


def submitted(submission: Submission, job: str) -> None:
    """Writes down SLURM's number of a job array."""
    write_json(submission.file, submission.record() | {"job": job})


def _runs_of(root: Path, name: str) -> list[str]:
    """The runs of a job's array indices, or none where the job is not of a sweep below `root`."""
    words = name.split("-")
    if len(words) != 3 or words[0] != "soup":
        return []
    return Submission(root / sweeps.FOLDER / words[1] / "slurm" / words[2]).record()["runs"]


def _last_words(sweep: sweeps.Sweep, job: Known) -> str:
    """The last line of what a job wrote before or beside its run, where it failed."""
    if job.status != "failed":
        return ""
    for path in (sweep.folder / "slurm").glob(f"*/{job.job}_0_log.err"):
        lines = tail(path).decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""
    return ""


def _batches(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _ask(*command: str) -> str:
    why = None
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=True).stdout
    except FileNotFoundError as error:
        why, cause = f"there is no `{command[0]}` on this machine", error
    except subprocess.TimeoutExpired as error:
        why, cause = f"SLURM did not answer `{command[0]}` within {ASK_S} s", error
    except subprocess.CalledProcessError as error:
        why, cause = f"`{command[0]}` failed: {(error.stderr or error.stdout).strip()}", error
    fix = "`scontrol ping` says whether SLURM is up; launch=local runs on this machine"
    raise Refused(Problem(key="launch", value="slurm", why=why, fix=fix)) from cause
