"""What one job of `launch=slurm` does: trains a run folder in a process of its own, and goes on after a requeue.

SLURM signals every process of a job. SIGUSR2 says that the time limit is near (or, where the cluster is set up so, that
the job is preempted); SIGTERM comes with a preemption, a requeue and a cancellation alike, with a SIGKILL to follow.
The training process saves at its next step on SIGTERM; SIGUSR2 is for this process, which passes it on as SIGTERM.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from submitit import JobEnvironment
from submitit.core.utils import DelayedSubmission
from submitit.helpers import Checkpointable

from soup import pruning
from soup.cli.process import variables
from soup.record import DONE, Run, environment, now, read_json, write_json
from soup.train.nodes import Node
from soup.train.stopper import LOST

POLL_S = 0.1
SPARE_S = 10  # before the time limit: a run that has not stopped by then is requeued as it is


class Train(Checkpointable):
    """Trains the run in `folder`. `requeues`: how often SLURM may start its job again; `grace_s`: seconds between
    SIGUSR2 and the time limit."""

    def __init__(self, folder: str, *, threads: int, requeues: int, grace_s: int):
        self.folder, self.threads, self.requeues, self.grace_s = folder, threads, requeues, grace_s
        self._asked: list[int] = []

    def __call__(self) -> str:
        """Returns the run's status when it is finished.

        Raises:
            SystemExit: for any other; the job is FAILED, unless SLURM ended it.
        """
        run = Run(Path(self.folder))
        node = _node(self._restarts())
        if node is not None and node.rank > 0:
            return self._follow(run, node)
        # submitit's own answer to SIGUSR2 (checkpoint, requeue, exit) is given below, once the run has stopped.
        requeue = signal.signal(signal.SIGUSR2, self._ask)
        signal.signal(signal.SIGTERM, self._ask)
        self._note_restart(run)
        _forget_half_written()
        if run.state() not in _good(run):
            if self._restarts() > self.requeues:
                self._give_up(run)
            status = self._train(run, node, requeue)
            self._after(run, status, requeue)
        return run.state()

    def checkpoint(self) -> DelayedSubmission:
        """What submitit runs after a requeue: the same once more.

        Raises:
            SystemExit: it was requeued often enough.
        """
        if self._restarts() >= self.requeues:
            self._give_up(Run(Path(self.folder)))
        return DelayedSubmission(
            Train(self.folder, threads=self.threads, requeues=self.requeues, grace_s=self.grace_s)
        )

    def _follow(self, run: Run, node: Node) -> str:
        """The part of a further machine of a run. How the run ended, and whether to requeue, is the first one's."""
        signal.signal(signal.SIGUSR2, self._ask)
        signal.signal(signal.SIGTERM, self._ask)
        if run.state() not in _good(run):
            print(f"the processes of node {node.rank} ended with {self._train(run, node, None)}", flush=True)
        return "followed"

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self._asked.append(number)

    def _train(self, run: Run, node: Node | None, requeue: Any) -> int:
        """Runs the training process to its end; returns its exit status, negative for a signal."""
        if not run.environment.is_file() and requeue is not None:
            write_json(run.environment, environment() | {"threads": self.threads})
        threads = (read_json(run.environment) or {"threads": self.threads})["threads"]
        # Blocked in the child and in what it starts (trackers), whom the signal would kill.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        with run.console.open("ab") as console:
            process = subprocess.Popen(
                [sys.executable, "-m", "soup.train", self.folder],
                env=os.environ | variables(threads) | (node.variables() if node else {}),
                stdout=console,
                stderr=console,
            )
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        sent, end = 0, None
        while (status := process.poll()) is None:
            if len(self._asked) > sent:
                sent = len(self._asked)
                process.send_signal(signal.SIGTERM)
                if end is None and signal.SIGUSR2 in self._asked and requeue is not None:
                    end = time.monotonic() + max(0, self.grace_s - SPARE_S)
            if end is not None and time.monotonic() > end:
                print("the next step did not come in time: requeued without saving", flush=True)
                requeue(signal.SIGUSR2, None)
            time.sleep(POLL_S)
        return status

    def _after(self, run: Run, status: int, requeue: Any) -> None:
        """What the job comes to, now that the training process is gone."""
        state = run.state()
        if state in _good(run):
            return
        if (self._asked and state != "diverged") or status == LOST:
            # A grace period after a preemption leaves the job RUNNING, and it would not be requeued if it ended
            # by itself. What is cancelled or requeued already is no longer RUNNING, and must not be requeued.
            known = _state_of_job()
            if known == "RUNNING" or (known is None and signal.SIGUSR2 in self._asked):
                requeue(signal.SIGUSR2, None)
            if self._asked:
                _end(f"stopped by {signal.Signals(self._asked[-1]).name}")
            _end((run.result() or {}).get("error", "another machine is gone"))
        result = run.result() or {}
        error = str(result.get("error") or f"the training process ended with {status}")
        if state not in ("failed", "diverged"):
            if status < 0:
                error = f"the training process died of {signal.Signals(-status).name}"
            run.finish("failed", error=error)
        _end(f"{run.state()}: {error}")

    def _give_up(self, run: Run) -> None:
        error = f"its job was requeued {self._restarts()} times, and launch.max_requeues={self.requeues}"
        run.finish("failed", error=error)
        _end(error)

    def _note_restart(self, run: Run) -> None:
        """Adds to requeues.json which job starts again, where, and what had stopped it."""
        if self._restarts() == 0:
            return
        file = run.folder / "requeues.json"
        last = run.last_checkpoint()
        line = {
            "time": now(),
            "job": _job(),
            "restart": self._restarts(),
            "host": socket.gethostname(),
            "stopped": (run.result() or {}).get("error") or "not recorded",
            "from": last.name if last else None,
        }
        write_json(file, [*(read_json(file) or []), line])

    @staticmethod
    def _restarts() -> int:
        return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _node(restarts: int) -> Node | None:
    """Which of the run's machines this is, where it has several: each has one task of the job."""
    if int(os.environ["SLURM_NTASKS"]) == 1:
        return None
    # srun is called on the first machine, and the others' way to it is this address.
    head, life = os.environ["SLURM_LAUNCH_NODE_IPADDR"], f"{os.environ['SLURM_JOB_ID']}.{restarts}"
    return Node(int(os.environ["SLURM_PROCID"]), head, life)


def _good(run: Run) -> tuple[str, ...]:
    """States in which nothing is left to do: a run that another sweep has pruned goes on where nothing prunes."""
    return DONE if pruning.of(run) else ("finished",)


def _end(why: str) -> NoReturn:
    """Ends the job as one that failed. An exception would leave a traceback of submitit's in its log."""
    print(why, flush=True)
    sys.exit(1)


def _state_of_job() -> str | None:
    """What SLURM says of this job, `None` where it does not answer."""
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={os.environ['SLURM_JOB_ID']}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _forget_half_written() -> None:
    """submitit does not write a pickle whose last writing was cut off by a kill."""
    paths = JobEnvironment().paths
    for path in (paths.result_pickle, paths.submitted_pickle):
        path.with_suffix(f"{path.suffix}.save_tmp").unlink(missing_ok=True)


def _job() -> str:
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array else os.environ["SLURM_JOB_ID"]
