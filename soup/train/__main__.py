"""`python -m soup.train [--prove] FOLDER`: the training process. Reads that folder, and prints progress.

Everything that libraries print goes to log.txt; the terminal gets what soup says. Exit status: 0 finished,
1 failed, diverged or a setting without effect, 2 refused, 130 interrupted.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from pathlib import Path

from soup.errors import Refused
from soup.record import Run, write_json

PR_SET_PDEATHSIG = 1  # prctl(2)
EXIT = {"finished": 0, "interrupted": 130}


def main(words: list[str]) -> int:
    """Trains or proves one run folder; returns the exit status."""
    prove_only = words[0] == "--prove"
    run = Run(Path(words[-1]))
    _die_with_parent()
    console_fd = _library_output_to(run.folder / "log.txt")

    from filelock import FileLock
    from rich.console import Console

    from soup.train.callbacks import Stopper
    from soup.train.progress import Display

    with open(console_fd, "w", encoding="utf-8") as stream, FileLock(run.lock_file):
        console = Console(file=stream)
        if (run.result() or {}).get("status") == "finished":
            return 0  # another process finished it while this one waited for the lock
        stopper = Stopper()
        stopper.install()
        try:
            from soup.train import job

            if prove_only:
                write_json(run.effective, job.effects.to_json(job.prove(run)))
                return 0
            run.result_file.unlink(missing_ok=True)
            status = job.train(run, Display(console), stopper)
        except Refused as refused:
            run.finish("failed", error=str(refused))
            console.print(str(refused), highlight=False, markup=False)
            return 2 if not run.effective.exists() else 1
        except Exception as error:  # noqa: BLE001
            text = traceback.format_exc()
            print(text, file=sys.stderr)
            run.finish("failed", error=f"{type(error).__name__}: {error}", traceback=text)
            console.print(f"failed: {type(error).__name__}: {error}", highlight=False, markup=False)
            console.print(f"the traceback is in {run.folder / 'log.txt'}", highlight=False, markup=False)
            return 1
    return EXIT.get(status, 1)


def _die_with_parent() -> None:
    """A parent that dies takes this process along: it is asked to save and stop, as by SIGTERM."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _library_output_to(log: Path) -> int:
    """Sends file descriptors 1 and 2 to `log`; returns one that still leads to the terminal."""
    sys.stdout.flush()
    console = os.dup(1)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    return console


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
