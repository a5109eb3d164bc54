"""`launch=slurm`: the runs of a sweep as job arrays. A command killed at any moment leaves nothing that runs twice."""

from __future__ import annotations

import shlex
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra_plugins.soup_launchers._job import Train
from submitit import SlurmExecutor
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError

from soup import slurm, snapshot
from soup.choices import launch as choices
from soup.device import resolve
from soup.errors import Problem, Refused
from soup.record import Run, now, write_json
from soup.slurm import Submission
from soup.specs import LaunchSpec
from soup.sweep import Sweep, SweepPoint

ARRAY = 1000  # jobs of one array: SLURM's default MaxArraySize is 1001
POLL_S = (1.0, 10.0)  # between two looks at the queue: at first, and at most
REST_S = 60  # that the tasks of a job have once the first of them is gone
LOCK = ".slurm.lock"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """A run, the resources that its job asks for, the kind of device that it was checked for, and its processes on each
    of `nodes`."""

    run: Run
    launch: LaunchSpec
    device: str
    processes: int = 1
    nodes: int = 1

    @property
    def resources(self) -> Mapping[str, Any]:
        return self.launch.slurm  # type: ignore[return-value]


def start(sweep: Sweep, say: Say, only: Sequence[str] | None = None, feed: Any = None) -> int:
    """Submits what is neither done nor in the queue; with `launch.wait` returns once no job is left.

    Returns 130 where it was asked to wait no longer, else 0. `only`: ids of the runs to submit. `feed`: has further
    points, as jobs end (`soup.cli.study`).

    Raises:
        Refused: SLURM does not answer, or does not take the jobs.
    """
    if feed is not None:
        return _fed(sweep, say, only or (), feed)
    points = [_wanted(sweep, point) for point in sweep.points() if only is None or point.run in only]
    _submit(sweep, points, say)
    if all(one.launch.wait and not one.resources["dry_run"] for one in points):
        return _wait(sweep, [one.run for one in points], say)
    return 0


def _submit(sweep: Sweep, points: Sequence[Wanted], say: Say) -> None:
    dry = any(one.resources["dry_run"] for one in points)
    with FileLock(sweep.folder.parent / LOCK):  # two commands at once do not both submit a point
        waiting = {} if dry else slurm.queued(sweep.root)
        done = [one for one in points if one.run.state() in sweep.done]
        rest = [one for one in points if one not in done and one.run.id not in waiting]
        code = snapshot.take((sweep.folder / "code").absolute())
        arrays = [
            Array(sweep, group[first : first + ARRAY], code, dry)
            for group in _alike(rest)
            for first in range(0, len(group), ARRAY)
        ]
        if dry:
            for array in arrays:
                say(
                    f"{array.script()}\nwritten to {array.submission.folder / 'script.sh'}; nothing is submitted"
                )
            return
        jobs = [array.send() for array in arrays]
    queued = len(points) - len(done) - len(rest)
    say(
        f"sweep {sweep.id}: {len(rest)} submitted"
        + (f" as job {', '.join(jobs)}" if jobs else "")
        + (f", {queued} in the queue already" if queued else "")
        + (f", {len(done)} done before" if done else "")
    )


def _fed(sweep: Sweep, say: Say, first: Sequence[str], feed: Any) -> int:
    """Keeps as many jobs as the sweep may have, until there are no further points; returns 130 on Ctrl-C, else 0."""
    slurm.queued(sweep.root)  # a SLURM that does not answer at the beginning is not waited for
    most = sweep.record()["settings"]["array_parallelism"]
    todo, mine, pause_s, silent = set(first), set(first), POLL_S[0], False
    try:
        while True:
            try:
                going = mine & slurm.queued(sweep.root).keys()
                silent = False
            except Refused as refused:  # a controller that restarts, for example
                if not silent:
                    say(f"{refused.problems[0].why}; asking again")
                silent = True
            else:
                todo |= {point.run for point in feed.more(most - len(going | todo), going | todo)}
                if todo:
                    _submit(sweep, [_wanted(sweep, one) for one in sweep.points() if one.run in todo], say)
                    mine |= todo
                    todo, pause_s = set(), POLL_S[0]
                elif not going:
                    return 0
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, POLL_S[1])
    except KeyboardInterrupt:
        say(f"the jobs go on, and no further ones come; `soup cancel {sweep.id}` stops them")
        return 130


def cancel(sweep: Sweep, say: Say) -> int:
    """Cancels the sweep's jobs, those that wait and those that run; returns the exit status.

    Raises:
        Refused: SLURM does not answer.
    """
    with FileLock(sweep.folder.parent / LOCK):
        jobs = slurm.cancel(sweep.root, [point.run for point in sweep.points()])
    say(f"sweep {sweep.id}: {len(jobs)} jobs cancelled" + (f" ({', '.join(jobs[:10])})" if jobs else ""))
    return 0


def _wait(sweep: Sweep, runs: Sequence[Run], say: Say) -> int:
    """Returns once SLURM has no job of these runs left: 0, or 130 on Ctrl-C."""
    pause_s, before, silent = POLL_S[0], None, False
    try:
        while True:
            try:
                waiting = slurm.queued(sweep.root)
            except Refused as refused:  # a controller that restarts, for example
                if not silent:
                    say(f"{refused.problems[0].why}; asking again")
                silent = True
            else:
                silent = False
                left = [waiting[run.id].status for run in runs if run.id in waiting]
                if not left:
                    break
                if left != before:
                    each = [f"{left.count(state)} {state}" for state in dict.fromkeys(left)]
                    say(f"{', '.join(each)}, {len(runs) - len(left)} ended")
                before = left
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, POLL_S[1])
    except KeyboardInterrupt:
        say(f"the jobs go on; `soup cancel {sweep.id}` stops them")
        return 130
    return 0


class Array(SlurmExecutor):
    """A job array. All that its jobs read is there before sbatch is called: submitit alone would move the pickles to
    where the jobs look for them only afterwards, and a process killed in between would leave jobs without."""

    def __init__(self, sweep: Sweep, points: Sequence[Wanted], code: Path, dry: bool):
        wanted, runs = points[0].resources, [one.run for one in points]
        self.submission = _new(sweep, dry)
        folder = self.submission.folder
        super().__init__(folder, max_num_timeout=wanted["max_requeues"])
        job = {"threads": wanted["cpus"], "requeues": wanted["max_requeues"], "grace_s": wanted["grace_s"]}
        for index, run in enumerate(runs):
            task = DelayedSubmission(Train(str(run.folder.absolute()), **job))
            task.set_timeout(wanted["time"], self.max_num_timeout)
            task.dump(folder / f"{index}.pkl")
        self.update_parameters(**_parameters(self.submission, wanted, points[0], code))
        self.parameters["map_count"] = len(runs)
        record = {"time": now(), "name": self.submission.name, "job": None, "code": str(code)}
        write_json(self.submission.file, record | {"runs": [run.id for run in runs]})

    @classmethod
    def affinity(cls) -> int:
        return (
            2  # a script can be written anywhere; what cannot submit it is found out by asking for the queue
        )

    def script(self) -> str:
        """The script of sbatch, and writes it."""
        text = self._make_submission_file_text(self._submitit_command_str, "")
        (self.submission.folder / "script.sh").write_text(text)
        return text

    def send(self) -> str:
        """Calls sbatch; returns the array's number.

        Raises:
            Refused: sbatch does.
        """
        try:
            job = self._submit_command(self._submitit_command_str).job_id
        except (FailedJobError, FailedSubmissionError) as error:
            shutil.rmtree(self.submission.folder)
            said = [line for line in str(error).splitlines() if "sbatch: error:" in line]
            why = said[-1].partition("sbatch: error: ")[2] if said else str(error)
            problem = Problem(
                key="launch", value="slurm", why=f"sbatch refuses: {why}", fix="correct launch.*"
            )
            raise Refused(problem) from error
        slurm.submitted(self.submission, job)
        return job


def _wanted(sweep: Sweep, point: SweepPoint) -> Wanted:
    settings = {key: value for key, value in sweep.settings(point).items() if key != "name"}
    run = sweep.run(point)
    spread = run.tree()["distributed"]
    kind = resolve(settings["device"]).kind
    return Wanted(run, choices.slurm(**settings), kind, spread["processes"], spread["nodes"])


def _alike(points: Sequence[Wanted]) -> list[list[Wanted]]:
    """The points by what they ask of SLURM: the jobs of one array ask for the same."""
    groups: dict[str, list[Wanted]] = {}
    for one in points:
        asked = (sorted(one.resources.items()), one.device, one.processes, one.nodes)
        groups.setdefault(repr(asked), []).append(one)
    return list(groups.values())


def _new(sweep: Sweep, dry: bool) -> Submission:
    for number in count():
        token = f"dry{number}" if dry else uuid.uuid4().hex[:8]
        submission = Submission((sweep.folder / "slurm" / token).absolute())
        if not submission.folder.exists():
            submission.folder.mkdir(parents=True)
            return submission
    raise AssertionError("count() ends never")


def _parameters(
    submission: Submission, wanted: Mapping[str, Any], like: Wanted, code: Path
) -> dict[str, Any]:
    """What submitit writes into the script: one task on each node, which starts the run's processes there."""
    gpus = wanted["gpus"] if wanted["gpus"] != "auto" else like.processes * (like.device == "cuda")
    given = {key: wanted[key] for key in ("partition", "account", "qos") if wanted[key] is not None}
    if wanted["mem_gb"] is not None:
        given["mem"] = f"{wanted['mem_gb']}GB"
    if gpus:
        given["gpus_per_node"] = gpus
    # srun does not take over the cores since SLURM 22.05. Of several tasks the first ends when the run has.
    srun = [f"--cpus-per-task={wanted['cpus']}"]
    srun += ["--kill-on-bad-exit=1", f"--wait={REST_S}"] if like.nodes > 1 else []
    return given | {
        "job_name": submission.name,
        "time": wanted["time"],
        "nodes": like.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": wanted["cpus"],
        "srun_args": srun,
        "signal_delay_s": wanted["grace_s"],
        "array_parallelism": wanted["array_parallelism"],
        "setup": [*wanted["setup"], *_environment(submission.folder, code, gpus)],
        # An array that waits for a job which failed ends, instead of waiting for ever.
        "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes"} | wanted["extra"],
    }


def _environment(folder: Path, code: Path, gpus: int) -> list[str]:
    """Lines of shell: soup comes from the copy, its options from where the job's number is not known yet."""
    path = shlex.quote(f"{code}:{Path.cwd()}")
    lines = [
        f"export SOUP_SWEEP={folder.parents[1].name}",
        f"export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1  # or the folder that this was submitted from came before the copy",
        f"here={shlex.quote(str(folder))}",
        'task="$here/${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}_submitted.pkl"',
        '[ -e "$task" ] || { cp "$here/$SLURM_ARRAY_TASK_ID.pkl" "$task.part" && mv "$task.part" "$task"; }',
    ]
    return lines if gpus else [*lines, "export CUDA_VISIBLE_DEVICES="]
