"""A run of several processes: torchrun's elastic agent starts them, watches them, and ends all where one ends badly.

The run's own process becomes the agent. It holds the run's lock and passes on the wish to stop; rank 0 logs, tracks
and writes. The lock is every rank's standard input, and the terminal its standard output: so the lock is held until
the last of them is gone, whoever dies first.

On each further machine (`soup.train.nodes`) a process follows this one: an agent for the ranks there, without the lock.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soup.errors import Problem, RecordError, Refused
from soup.record import Run, read_json, write_json
from soup.schema import Config, check
from soup.specs import DistributedSpec
from soup.train import nodes
from soup.train.stopper import INTERRUPTED, LOST, Stopper

LOOK_S = 0.1  # between looks at the ranks
GRACE_S = 10  # that ranks have where another machine's failed, before they are killed; torch's agent gives 30
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Cause:
    """Why a run of several processes ended: `status` of the run, `code` of its process."""

    status: str
    error: str
    code: int = 1
    traceback: str | None = None


class Leader(Stopper):
    """Passes the wish to stop on to the ranks; a second SIGINT ends them at once."""

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked is not None and number == signal.SIGINT:
            for process in _ranks():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        super()._ask(number, frame)


def lead(
    run: Run, config: Config, words: Sequence[str], console_fd: int, lock_fd: int, stopper: Stopper
) -> Cause | None:
    """Starts the ranks and waits for their end; `None` where they say themselves how it ended."""
    spread, node = config.distributed, nodes.here()
    notes = _notes(run)
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir()
    os.dup2(lock_fd, 0)
    os.dup2(console_fd, 1)
    leader = _leader(stopper)
    try:
        if node is None:
            died = _start(run, spread, words, leader)
        else:
            store, endpoint = nodes.listen(notes, node)
            died = _start(run, spread, words, leader, node, endpoint)
            del store
            if died is not None:
                told = _told(notes, node, spread, died)
                died |= {rank: status for one in told.values() for rank, status in one.items()}
                silent = sorted({*range(1, spread.nodes)} - told.keys())
                found = _read(notes)
                missed = all(rank in found and found[rank]["lost"] for rank in died)
                if silent and missed and leader.asked is None:
                    text = f"node {silent[0] + 1} of {spread.nodes} is gone: it does not say how it ended"
                    return Cause("interrupted", text, LOST)
        if died is None:
            return None
        return _cause(died, _read(notes), leader.asked, spread.world, spread.timeout_s)
    finally:
        shutil.rmtree(notes, ignore_errors=True)


def follow(run: Run, words: Sequence[str], node: nodes.Node, stopper: Stopper) -> int:
    """Has the run's processes on a further machine train; how they ended, the first one tells. Returns an exit status:
    0, also where the run failed."""
    notes, leader = _notes(run), _leader(stopper)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    endpoint = nodes.endpoint(notes, node, lambda: leader.asked is not None)
    if endpoint is not None:
        died = _start(run, check(run.tree()).distributed, words, leader, node, endpoint)
        if died is not None:
            nodes.failed(notes, node, died)
        nodes.until_over(notes, node)
    return 0


def _leader(stopper: Stopper) -> Leader:
    leader = Leader()
    leader.asked = stopper.asked
    leader.install()
    return leader


def _start(
    run: Run,
    spread: DistributedSpec,
    words: Sequence[str],
    leader: Leader,
    node: nodes.Node | None = None,
    endpoint: str = "localhost:0",  # a free port
) -> dict[int, int] | None:
    """Has the agent start this machine's ranks, and waits for their end; returns the exit status of those that ended
    badly by themselves, in the order of their ends, or `None` where all ended well."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in THREADS:
        os.environ[name] = str(max(1, int(os.environ.get(name, "1")) // spread.processes))
    # Whatever the host's name resolves to.
    if (name := "lo" if node is None else nodes.interface(node)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    settings = LaunchConfig(
        min_nodes=spread.nodes,
        max_nodes=spread.nodes,
        nproc_per_node=spread.processes,
        run_id=run.id,
        rdzv_backend="c10d" if node is None else "static",  # static: ranks are in the order of the machines
        rdzv_endpoint=endpoint,
        rdzv_configs={} if node is None else {"rank": node.rank, "timeout": spread.timeout_s},
        local_addr="localhost" if node is None else node.address,
        max_restarts=0,  # soup's checkpoints resume a run, in new processes
        monitor_interval=LOOK_S,
        signals_to_handle="SIGQUIT",  # the others are the leader's
        shutdown_timeout=GRACE_S,
        logs_specs=DefaultLogsSpecs(log_dir=str(_notes(run))),
    )
    start = ["-m", "soup.train.rank", f"--agent={os.getpid()}", *words, str(run.folder)]
    lost = None if node is None else lambda: bool(nodes.others(_notes(run), node))
    killed: set[int] = set()
    try:
        with _passing_on(leader, lost, killed):
            elastic_launch(settings, sys.executable)(*start)
    except ChildFailedError as failed:
        ended = sorted(failed.failures.items(), key=lambda item: item[1].timestamp)
        return {rank: one.exitcode for rank, one in ended if one.pid not in killed}
    except DistError as error:
        if node is None:
            raise
        key = "distributed.nodes"
        why = f"they did not meet at {endpoint} within distributed.timeout_s={spread.timeout_s}: {error}"
        fix = "what the SLURM job's other tasks wrote (slurm/*/*_log.err below the sweep) says why"
        raise Refused(Problem(key=key, value=spread.nodes, why=why, fix=fix)) from error
    return None


def _told(
    notes: Path, node: nodes.Node, spread: DistributedSpec, died: Mapping[int, int]
) -> dict[int, dict[int, int]]:
    """Tells the other machines that the run failed here, and waits for what they tell: `nodes.others`."""
    nodes.failed(notes, node, died)
    end = time.monotonic() + 3 * GRACE_S  # they may need one to end theirs
    while len(found := nodes.others(notes, node)) < spread.nodes - 1 and time.monotonic() < end:
        time.sleep(LOOK_S)
    return found


def note(run: Run, rank: int, error: BaseException, code: int) -> None:
    """A rank writes down what went wrong, for the leader. `code`: the exit status that the run comes to."""
    refused = isinstance(error, Refused)
    told = str(error) if isinstance(error, Refused | RecordError) else f"{type(error).__name__}: {error}"
    with suppress(OSError, RecordError):
        write_json(
            _notes(run) / f"{rank}.json",
            {
                "time": time.time(),
                "error": told,
                "code": code,
                "refused": refused,
                "lost": not refused and _is_lost(error),
                "waited": bool(re.search("timed? ?out", str(error), re.IGNORECASE)),
                "traceback": "".join(traceback.format_exception(error)),
            },
        )


def _cause(
    died: Mapping[int, int],
    notes: Mapping[int, Mapping[str, Any]],
    asked: str | None,
    world: int,
    timeout_s: int,
) -> Cause:
    """What went wrong first: that a rank lost another one is the consequence of something else. `died`: exit status by
    rank, in the order of their ends."""
    own = sorted((one["time"], rank) for rank, one in notes.items() if not one["lost"])
    if own:
        rank = own[0][1]
        one = notes[rank]
        if one["refused"]:  # each of them would say the same
            return Cause("failed", one["error"], one["code"])
        return Cause("failed", f"process {rank + 1} of {world}: {one['error']}", 1, one["traceback"])
    killed = {
        rank: signal.Signals(-code).name for rank, code in died.items() if code < 0 and rank not in notes
    }
    waited = any(one["waited"] for one in notes.values())
    if waited and killed.get(next(iter(died), -1), "SIGTERM") == "SIGTERM":  # who hangs is killed in the end
        silent = [str(rank + 1) for rank in range(world) if rank not in notes]
        who = f"process {', '.join(silent)} of {world}" if silent else f"one of {world} processes"
        text = min(notes.values(), key=lambda one: one["time"])["traceback"]
        return Cause("failed", f"{who} did not answer within distributed.timeout_s={timeout_s}", 1, text)
    for rank, name in killed.items():
        if name != "SIGTERM":
            return Cause("interrupted", f"process {rank + 1} of {world} died of {name}")
    if asked is not None:
        return Cause("interrupted", f"stopped by {asked}", INTERRUPTED)
    if killed:
        rank, name = min(killed.items())
        return Cause("interrupted", f"process {rank + 1} of {world} died of {name}")
    if notes:
        rank, one = min(notes.items(), key=lambda item: item[1]["time"])
        return Cause(
            "failed", f"process {rank + 1} of {world} lost the others: {one['error']}", 1, one["traceback"]
        )
    if not died:
        return Cause("failed", f"one of {world} processes ended, and its machine did not tell how")
    rank, code = min(died.items())
    return Cause("failed", f"process {rank + 1} of {world} ended with {code}")


def _is_lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone, or does not answer."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error).lower() or "nccl" in str(error).lower()


def _notes(run: Run) -> Path:
    return run.folder / ".ranks"


def _read(notes: Path) -> dict[int, dict[str, Any]]:
    found = {}
    for path in notes.glob("[0-9]*.json"):
        with suppress(json.JSONDecodeError):
            found[int(path.stem)] = read_json(path)
    return found


@contextmanager
def _passing_on(leader: Leader, lost: Callable[[], bool] | None, killed: set[int]) -> Iterator[None]:
    """Tells each rank once, when it is there, that the run is asked to stop. A terminal's Ctrl-C reaches the leader
    alone: ranks have sessions of their own. `killed` gets the ranks that still wait a while after another machine's
    are `lost`: NCCL would wait for `distributed.timeout_s`."""
    over = threading.Event()

    def courier() -> None:
        told: set[int] = set()
        end = None
        while not over.wait(LOOK_S if lost is None else nodes.LOOK_S):
            if end is None and lost is not None and lost():
                end = time.monotonic() + GRACE_S
            if end is not None and time.monotonic() > end:
                for process in _ranks():
                    killed.add(process.pid)
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
            if leader.asked is not None:
                for process in _ranks():
                    if process.pid not in told:
                        told.add(process.pid)
                        with suppress(ProcessLookupError):
                            os.kill(process.pid, signal.SIGTERM)

    thread = threading.Thread(target=courier, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _ranks() -> list[Any]:
    import psutil

    return psutil.Process().children()
