"""`python -m soup.train.rank --agent=PID [--prove] FOLDER`: one of the processes of a run that has several.

torchrun's elastic agent starts it (`soup.train.torchrun`), with its lock as standard input and the terminal as
standard output. It ends with 0 where the run's files say how it ended, else it has noted why.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from soup.effects import NotInForce
from soup.errors import RecordError, Refused
from soup.record import Run
from soup.train.__main__ import Terminal, die_with_parent, library_output_to, prove, train
from soup.train.stopper import INTERRUPTED, Stopper
from soup.train.torchrun import note


def main(words: list[str]) -> int:
    agent = int(words[0].partition("=")[2])
    run, rank = Run(Path(words[-1])), int(os.environ["RANK"])
    stopper = Stopper()
    stopper.install()
    die_with_parent()
    if os.getppid() != agent:
        return INTERRUPTED
    os.dup(0)  # the lock, which what this process starts must not hold
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    console_fd = library_output_to(run.folder / ("log.txt" if rank == 0 else f"log.{rank}.txt"))
    if rank != 0:
        console_fd = os.open(os.devnull, os.O_WRONLY)

    from rich.console import Console

    with Terminal(console_fd) as stream:
        try:
            if "--prove" in words:
                prove(run)
            else:
                train(run, Console(file=stream), stopper)
        except Refused as refused:
            _fail(run, rank, refused, 1 if isinstance(refused, NotInForce) else 2)
        except (RecordError, Exception) as error:  # noqa: BLE001
            _fail(run, rank, error, 1)
    return 0


def _fail(run: Run, rank: int, error: BaseException, status: int) -> NoReturn:
    traceback.print_exception(error)
    note(run, rank, error, status)
    _end(1)


def _end(status: int) -> NoReturn:
    """Ends at once: an interpreter that is taken down waits for other processes, or aborts, where a thread of gloo
    still holds a tensor (https://github.com/pytorch/pytorch/pull/179291)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _end(main(sys.argv[1:]))
