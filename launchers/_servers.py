"""Training processes as the queue sees them: children of a fork server, or processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from soup.record import Run

WORDS = ("--if-free",)


class Plain:
    """A process of its own for each run: imports of its own, so about ten seconds more."""

    def __init__(self) -> None:
        self.processes: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}

    def descriptors(self) -> list[int]:
        """What becomes readable when there is news."""
        return list(self.processes)

    def start(self, run: Run, environment: Mapping[str, str]) -> None:
        with run.console.open("ab") as console:
            process = subprocess.Popen(
                [sys.executable, "-m", "soup.train", *WORDS, str(run.folder)],
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                process_group=0,
            )
        self.processes[os.pidfd_open(process.pid)] = (run.id, process)

    def signal(self, number: int) -> None:
        for _, process in self.processes.values():
            process.send_signal(number)

    def ended(self) -> Iterator[tuple[str, int]]:
        """Ids of runs whose process is gone, and its exit status, negative for a signal."""
        for descriptor, (run, process) in list(self.processes.items()):
            if process.poll() is not None:
                del self.processes[descriptor]
                os.close(descriptor)
                yield run, process.returncode

    def close(self) -> None:
        """Its runs have ended, and it holds nothing else."""


class Forked:
    """Children of a fork server (`soup.train.server`), which imports once for all.

    `able` is `None` until it has done so, and false where no run can be started from it: it died, or a
    library touched a GPU while it was imported.
    """

    def __init__(self, environment: Mapping[str, str], words: list[str], log: Path):
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "soup.train.server", *words],
                # By NVML, since torch would otherwise touch the device to see whether there is one.
                env=os.environ | environment | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                process_group=0,
            )
        self.able: bool | None = None
        self._runs: dict[str, str] = {}
        self._unread = b""
        os.set_blocking(self.process.stdout.fileno(), False)

    def descriptors(self) -> list[int]:
        return [] if self.process.stdout.closed else [self.process.stdout.fileno()]

    def start(self, run: Run, environment: Mapping[str, str]) -> None:
        self._runs[str(run.folder)] = run.id
        request = {
            "run": str(run.folder),
            "words": WORDS,
            "environment": dict(environment),
            "console": str(run.console),
        }
        self._ask(request)

    def signal(self, number: int) -> None:
        if self._runs:
            self._ask({"signal": number})

    def ended(self) -> Iterator[tuple[str, int]]:
        if self.process.stdout.closed:
            return
        while read := self._read():
            *lines, self._unread = (self._unread + read).split(b"\n")
            for line in lines:
                answer = json.loads(line)
                if "ready" in answer:
                    self.able = answer["ready"]
                if "ended" in answer:
                    yield self._runs.pop(answer["ended"]), answer["status"]
        if read == b"":  # it is gone, and its children are told so
            self.able = False
            self.process.stdout.close()
            status = self.process.wait()
            for folder in list(self._runs):
                yield self._runs.pop(folder), status if status < 0 else -signal.SIGTERM

    def close(self) -> None:
        """Ends the server; children that there still are save and stop."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        if self.able is None:  # in the middle of imports, it would not notice
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def _ask(self, request: Mapping[str, object]) -> None:
        with suppress(BrokenPipeError):  # `ended` will say so
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def _read(self) -> bytes | None:
        """What it said, b"" at its end, `None` where there is nothing yet."""
        try:
            return os.read(self.process.stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return None
