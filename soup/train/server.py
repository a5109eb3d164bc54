"""`python -m soup.train.server [--unsloth DEVICE]`: imports the training stack once, then forks a process for each run.

A child is as isolated as a new process: what a run patches (Liger's kernels, Unsloth's classes) is gone with it. The
server touches no device and computes nothing, so that no pool of threads is started: neither would survive the fork.

A line of JSON on standard input is a request, {"run": FOLDER, "words": [...], "environment": {...}, "console": FILE}
or {"signal": N} for all children. Lines on standard output are {"ready": true} (false where a library touched a GPU
while it was imported, so that no child could), {"started": FOLDER, "pid": P} and {"ended": FOLDER, "status": N},
negative for a signal. The end of standard input asks every child to save and stop.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

# What is loaded when it is first asked for, and nearly every run asks for. A package: all that is in it.
PRELOADED = (
    "omegaconf",
    "soup.choices",
    "soup.effects",
    "soup.train.job",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "trl.trainer.sft_trainer",
    "peft.tuners.lora.model",
    "peft.utils.transformers_weight_conversion",
)
STOPPING = {signal.SIGINT, signal.SIGTERM}


def main(words: Sequence[str]) -> int:
    """Serves until standard input ends and the last child is gone."""
    from soup.train.__main__ import die_with_parent

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks passes on what is meant for runs
    die_with_parent()
    requests, answers = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what libraries print while they are imported
    preload(words)
    return Server(requests, answers).serve()


def preload(words: Sequence[str]) -> None:
    """Imports what the children need."""
    from soup.train import spared

    spared.absent({"deepspeed"})  # runs of several processes are not forked from here
    if words[:1] == ["--unsloth"]:
        from soup.device import resolve
        from soup.model import unsloth

        unsloth.take_over(resolve(words[1]))
    for name in PRELOADED:
        module = importlib.import_module(name)
        if name.startswith("soup."):
            for one in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{name}."):
                importlib.import_module(one.name)
    gc.collect()
    gc.freeze()  # the garbage collector writes to what it visits, and a page written is a page copied


class Server:
    """`children`: the folder of each run and its pid, by the descriptor that becomes readable when it ends."""

    def __init__(self, requests: int, answers: int):
        self.requests, self.answers = requests, answers
        self.children: dict[int, tuple[str, int]] = {}
        self.poll = select.poll()
        self.stopping = False
        signal.signal(signal.SIGTERM, self._stop)

    def serve(self) -> int:
        self._tell(ready=not _touched())
        self.poll.register(self.requests, select.POLLIN)
        unread, open_ = b"", True
        while open_ or self.children:
            for descriptor, _ in self.poll.poll(1000):
                if descriptor != self.requests:
                    self._ended(descriptor)
                    continue
                read = os.read(self.requests, 1 << 16)
                if not read:
                    open_ = False
                    self.poll.unregister(self.requests)
                    self._signal(signal.SIGTERM)
                *lines, unread = (unread + read).split(b"\n")
                for line in lines:
                    self._answer(json.loads(line))
            if self.stopping and open_:  # the process that asks is gone
                open_ = False
                self.poll.unregister(self.requests)
        return 0

    def _stop(self, *_: Any) -> None:
        self.stopping = True
        self._signal(signal.SIGTERM)

    def _answer(self, request: dict[str, Any]) -> None:
        if "signal" in request:
            self._signal(request["signal"])
        elif not self.stopping:
            self._start(request)

    def _start(self, request: dict[str, Any]) -> None:
        # Blocked until the child has its own handlers: a signal that comes before would kill it, or go to ours.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become(request, server)
        folder, descriptor = request["run"], os.pidfd_open(pid)
        self.children[descriptor] = (folder, pid)
        self.poll.register(descriptor, select.POLLIN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        self._tell(started=folder, pid=pid)

    def _become(self, request: dict[str, Any], server: int) -> NoReturn:
        """The child: the training process of one run."""
        status = 1
        try:
            os.close(self.requests)
            os.close(self.answers)
            for descriptor in self.children:
                os.close(descriptor)
            os.environ.update(request["environment"])
            console = os.open(request["console"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(console, 1)
            os.dup2(console, 2)
            os.close(console)
            from soup.train.__main__ import main as train

            status = train([*request["words"], request["run"]], parent=server)
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else 1
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _ended(self, descriptor: int) -> None:
        folder, pid = self.children.pop(descriptor)
        self.poll.unregister(descriptor)
        os.close(descriptor)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._tell(ended=folder, status=status)

    def _signal(self, number: int) -> None:
        for _, pid in list(self.children.values()):
            os.kill(pid, number)  # a child that has ended keeps its pid until it is waited for

    def _tell(self, **answer: Any) -> None:
        try:
            os.write(self.answers, json.dumps(answer).encode() + b"\n")
        except BrokenPipeError:
            self.stopping = True


def _touched() -> bool:
    """Whether a child of this process could no longer use a GPU: CUDA does not survive a fork."""
    import torch

    pid = os.fork()
    if pid == 0:
        os._exit(int(torch.cuda._is_in_bad_fork()))
    return os.waitpid(pid, 0)[1] != 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
