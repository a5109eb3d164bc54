"""`python -m soup.train [--prove] [--if-free] FOLDER`: the training process. Reads that folder, and prints progress.

Everything that libraries print goes to log.txt; the terminal gets what soup says. Exit status: 0 finished,
1 failed, diverged or a setting without effect, 2 refused, 130 interrupted, 75 with --if-free where another
process has the run.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import io
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from soup import pruning
from soup.device import resolve
from soup.effects import NotInForce
from soup.errors import RecordError, Refused
from soup.model import unsloth
from soup.record import Run
from soup.schema import Config, check
from soup.train import nodes, spared
from soup.train.stopper import BUSY, INTERRUPTED, Stopper

PR_SET_PDEATHSIG = 1  # prctl(2)
EXIT = {"finished": 0, "pruned": 0, "interrupted": INTERRUPTED}


class Terminal(io.TextIOWrapper):
    """A terminal or pipe that may go away before the run does: what is printed then is lost, the run is not."""

    def __init__(self, descriptor: int):
        super().__init__(io.FileIO(descriptor, "wb"), encoding="utf-8", write_through=True)

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)


def main(words: list[str], *, parent: int | None = None) -> int:
    """Trains or proves one run folder; returns the exit status. `parent`: what forked this process for it."""
    prove_only, if_free = "--prove" in words, "--if-free" in words
    run = Run(Path(words[-1]))
    stopper = Stopper()
    stopper.install()
    die_with_parent()
    if parent is not None and os.getppid() != parent:
        return INTERRUPTED  # it died before it could be watched
    if (node := nodes.here()) is not None and node.rank > 0:
        from soup.train import torchrun

        library_output_to(run.folder / f"log.node-{node.rank}.txt")
        return torchrun.follow(run, ["--prove"] if prove_only else [], node, stopper)
    console_fd = library_output_to(run.folder / "log.txt")

    from filelock import FileLock
    from rich.console import Console

    lock = FileLock(run.lock_file)
    with Terminal(console_fd) as stream:
        if not _acquire(lock, stopper, wait=not if_free):
            return INTERRUPTED if stopper.asked else BUSY
        console = Console(file=stream)
        try:
            if (run.result() or {}).get("status") in ("finished", *(("pruned",) if pruning.of(run) else ())):
                return 0  # another process finished it while this one waited for the lock
            config = check(run.tree())
            if config.distributed.world > 1:
                return _lead(run, config, console, console_fd, lock, stopper, prove_only)
            if not prove_only:
                run.result_file.unlink(missing_ok=True)
            return prove(run) if prove_only else train(run, console, stopper)
        except Refused as refused:
            return _failed(run, console, str(refused), status=1 if isinstance(refused, NotInForce) else 2)
        except RecordError as error:
            return _failed(run, console, str(error), traceback=traceback.format_exc())
        except Exception as error:  # noqa: BLE001
            return _failed(run, console, f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        finally:
            lock.release()


def _lead(
    run: Run, config: Config, console: Any, console_fd: int, lock: Any, stopper: Stopper, prove_only: bool
) -> int:
    """Has several processes train or prove the run; returns the exit status."""
    nodes.needed(config.distributed)
    from soup.train import torchrun

    run.result_file.unlink(missing_ok=True)
    words = ["--prove"] if prove_only else []
    cause = torchrun.lead(run, config, words, console_fd, lock._context.lock_file_fd, stopper)
    if cause is not None and cause.status == "interrupted" and run.result() is not None:
        cause = None  # a process died once all was written
    if cause is None:
        return 0 if prove_only else EXIT.get((run.result() or {}).get("status"), 1)
    if cause.status == "failed":
        details = {"traceback": cause.traceback} if cause.traceback else {}
        return _failed(run, console, cause.error, status=cause.code, **details)
    last = run.last_checkpoint()
    step = 0 if last is None else int(last.name.rpartition("-")[2])
    run.finish(cause.status, error=cause.error, step=step)
    console.print(f"{cause.status}: {cause.error}", highlight=False, markup=False, soft_wrap=True)
    return cause.code


def train(run: Run, console: Any, stopper: Stopper) -> int:
    """Trains the run in this process; returns the exit status."""
    job = _job(run)
    from soup.train.progress import Display

    while (status := job.train(run, Display(console), stopper)) == "rolled back":
        gc.collect()  # the model that diverged
    return EXIT.get(status, 1)


def prove(run: Run) -> int:
    """Builds the run in this process, and writes down what is in force."""
    _job(run).prove(run)
    return 0


def _job(run: Run) -> Any:
    """`soup.train.job`, whose imports Unsloth must come before where it is the backend."""
    config = check(run.tree())
    spared.absent(spared.unused(config))
    if config.backend.unsloth:
        unsloth.take_over(resolve(config.launch.device))
    from soup.train import job

    return job


def _failed(run: Run, console: Any, error: str, *, status: int = 1, **details: str) -> int:
    """Records a failure and says it in short; on a full disk even that may be all there is left to do."""
    with suppress(OSError):
        print(details.get("traceback", error), file=sys.stderr, flush=True)
    try:
        run.finish("failed", error=error, **details)
    except RecordError as unwritten:
        error += f"\n{unwritten}"
    if details:
        broken = any(f"{kind}: " in error for kind in ("ImportError", "ModuleNotFoundError"))
        error = f"failed: {error}\nthe traceback is in {run.folder / 'log.txt'}"
        error += "\n`soup doctor` says which package is broken, and what mends it" if broken else ""
    console.print(error, highlight=False, markup=False, soft_wrap=True)
    return status


def _acquire(lock: Any, stopper: Stopper, *, wait: bool) -> bool:
    """Waits for the run's lock, or takes a look at it; false where it is held, or the wait was asked to stop."""
    from filelock import Timeout

    while stopper.asked is None:
        with suppress(Timeout):
            lock.acquire(timeout=1)  # who asks whether it is held has it for a moment
            return True
        if not wait:
            break
    return False


def die_with_parent() -> None:
    """A parent that dies takes this process along: it is asked to save and stop, as by SIGTERM."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def library_output_to(log: Path) -> int:
    """Sends file descriptors 1 and 2 to `log`; returns one that still leads to the terminal."""
    sys.stdout.flush()
    console = os.dup(1)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    faulthandler.enable(2)  # where a crash in native code is, its log says
    return console


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
