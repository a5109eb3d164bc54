"""`launch=local`: runs the points of a sweep on this machine, several at a time, from what lies on disk.

Two such processes may have one sweep: a run is locked by the process that trains it, the other takes the next.
"""

from __future__ import annotations

import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hydra_plugins.soup_launchers._servers import Forked, Plain

from soup import parents, record
from soup.cli.process import threads, variables
from soup.cli.table import summary
from soup.device import gpus, resolve, slots
from soup.record import Run, read_json, write_json
from soup.sweep import Sweep, SweepPoint
from soup.train.stopper import BUSY, INTERRUPTED

LOOK_S = 0.2  # between looks at what runs have printed
ELSEWHERE_S = 1.0  # and at runs that another process trains

Say = Callable[[str], None]


def start(sweep: Sweep, say: Say, only: Sequence[str] | None = None, feed: Any = None) -> int:
    """Runs what is not finished, or starts a process that does; returns 130 where it was asked to stop, else 0.

    `only`: ids of the runs to start. `feed`: has further points, once there is room (`soup.cli.study`).
    """
    if not sweep.record()["settings"]["wait"]:
        return _detach(sweep, say, only)
    return work(sweep, say, only, feed)


def work(sweep: Sweep, say: Say, only: Sequence[str] | None = None, feed: Any = None) -> int:
    """Runs what is not finished, in this process."""
    with parents.registered(sweep):
        return Queue(sweep, say, only, feed).work()


def cancel(sweep: Sweep, say: Say) -> int:
    """Asks the processes that run the sweep to stop; their runs save at the next step, and can go on later."""
    return parents.stop(sweep, say)


def _detach(sweep: Sweep, say: Say, only: Sequence[str] | None) -> int:
    if there := parents.alive(sweep):
        say(f"process {there[0]['pid']} runs this sweep already")
        return 0
    with sweep.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "soup.cli.detached", str(sweep.folder), *(only or ())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    while not any(one["pid"] == process.pid for one in parents.alive(sweep)):
        if process.poll() is not None:
            break
        time.sleep(0.02)
    if process.poll():
        say(f"it ended with status {process.returncode}; {sweep.log} says why")
        return 1
    if process.poll() == 0:
        say("there was nothing left to run")
        return 0
    say(f"process {process.pid} runs it; this terminal may be closed")
    return 0


class Queue:
    """`todo`: points to start; `busy`: slots of each point that runs; `elsewhere`: what another process trains."""

    def __init__(self, sweep: Sweep, say: Say, only: Sequence[str] | None, feed: Any = None):
        self.sweep, self.say, self.feed = sweep, say, feed
        self.done = sweep.done
        self.begun = time.time()
        points = sweep.points()
        self.number = {point.run: number for number, point in enumerate(points, 1)}
        self.point = {point.run: point for point in points}
        chosen = [point for point in points if only is None or point.run in only]
        states = {point.run: sweep.run(point).state() for point in chosen}
        self.todo = deque(point for point in chosen if states[point.run] not in (*self.done, "running"))
        self.elsewhere = [point for point in chosen if states[point.run] == "running"]
        self.looked = 0.0
        settings = sweep.record()["settings"]
        device = resolve(settings["device"])
        self.slots = slots(settings["slots"], device)
        self.gpus = gpus() if device.kind == "cuda" else []
        self.free = list(range(self.slots))[::-1]
        self.busy: dict[str, list[int]] = {}
        self.shown: dict[str, int] = {}  # bytes of console.txt, by run
        self.workers: dict[tuple[str, ...], Plain | Forked] = {}
        self.environment: dict[str, object] | None = None
        self.asked: list[int] = []  # signals, of which `told` have been passed on
        self.told = 0

    def work(self) -> int:
        with self._asked_to_stop():
            try:
                while self.busy or (not self.asked and (self._fed() or self.todo or self.elsewhere)):
                    self._fed()
                    self._fill()
                    self._wait()
                    self._pass_on()
                    self._show()
                    self._look_elsewhere()
                    for worker in list(self.workers.values()):
                        for run, status in worker.ended():
                            self._ended(self.point[run], status)
            finally:
                for worker in self.workers.values():
                    worker.close()
        return INTERRUPTED if self.asked else 0

    def _fed(self) -> bool:
        """Takes further points where there is room for them; whether there were any."""
        room = len(self.free) - len(self.todo)
        if self.feed is None or self.asked or room <= 0:
            return False
        going = {*self.busy, *(point.run for point in (*self.todo, *self.elsewhere))}
        new = self.feed.more(room, going)
        for point in new:
            self.number.setdefault(point.run, len(self.number) + 1)
            self.point[point.run] = point
            self.todo.append(point)
        return bool(new)

    def _fill(self) -> None:
        while self.todo and self.free and not self.asked:
            point = self.todo[0]
            run = self.sweep.run(point)
            if run.state() in self.done:  # by another process, meanwhile
                self.todo.popleft()
                continue
            tree = run.tree()
            if len(self.free) < self._width(tree):
                return
            worker = self._worker(run, tree)
            if worker is None:
                return  # a server that is still importing
            self.todo.popleft()
            slots = [self.free.pop() for _ in range(self._width(tree))]
            self.busy[run.id] = slots
            self.shown[run.id] = run.console.stat().st_size if run.console.exists() else 0
            environment = {"SOUP_SWEEP": self.sweep.id, **variables(self._threads(run))}
            if self.gpus:
                # Fewer slots than processes: such a run is alone, with as many GPUs as it needs.
                count = tree["distributed"]["processes"]
                own = [self.gpus[slot % len(self.gpus)] for slot in slots]
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(
                    own if len(own) == count else self.gpus[:count]
                )
            self._tell(point, f"{point.words}: run {run.id}")
            worker.start(run, environment)

    def _width(self, tree: Mapping[str, Any]) -> int:
        """Slots that a run takes: on GPUs one for each of its processes."""
        return min(tree["distributed"]["processes"], self.slots) if self.gpus else 1

    def _worker(self, run: Run, tree: Mapping[str, Any]) -> Plain | Forked | None:
        """What starts the run, or `None` while that is not ready."""
        device = resolve(tree["launch"]["device"]).kind
        unsloth = tree["backend"]["name"] == "unsloth"
        plain = self.workers.setdefault(("plain",), Plain())
        if _several_processes(tree) or (unsloth and device == "cuda"):  # Unsloth touches the GPU on import
            return plain
        count = self._threads(run)  # a library reads it when it is imported, so not to be changed in a child
        key = ("unsloth" if unsloth else "transformers", str(count))
        if key not in self.workers:
            words = ["--unsloth", device] if unsloth else []
            self.workers[key] = Forked(variables(count), words, self.sweep.folder / "server.txt")
        server = self.workers[key]
        if server.able is False:
            return plain
        return server if server.able else None

    def _threads(self, run: Run) -> int:
        """Those that the run began with, else the cores that a slot has; recorded before its first start."""
        recorded = read_json(run.environment)
        if recorded is None:
            self.environment = self.environment or record.environment()
            recorded = self.environment | {"time": record.now(), "threads": threads(self.slots)}
            write_json(run.environment, recorded)
        return recorded.get("threads", threads(1))

    def _wait(self) -> None:
        poll = select.poll()
        for worker in self.workers.values():
            for descriptor in worker.descriptors():
                poll.register(descriptor, select.POLLIN)
        poll.poll(LOOK_S * 1000)

    def _pass_on(self) -> None:
        for number in self.asked[self.told :]:
            if self.told == 0 and self.busy:
                self.say("stopping: each run saves at its next step; once more stops at once")
            for worker in self.workers.values():
                # Of two equal signals in a row a process may see one; a killed run goes on from its last checkpoint.
                worker.signal(number if self.told == 0 else signal.SIGKILL)
            self.told += 1

    def _ended(self, point: SweepPoint, status: int) -> None:
        self._show()
        run = self.sweep.run(point)
        self.free.extend(self.busy.pop(run.id))
        if status == BUSY:
            self.elsewhere.append(point)
            self._tell(point, "another process trains it")
        elif status < 0:
            self._tell(point, f"died of signal {-status}")
        else:
            state = run.state()
            self._tell(point, f"{state}: {summary(run)}" if state == "finished" else state)

    def _look_elsewhere(self) -> None:
        """Runs that another process had: done, or ours to start."""
        if time.monotonic() - self.looked < ELSEWHERE_S:
            return
        self.looked = time.monotonic()
        for point in list(self.elsewhere):
            run = self.sweep.run(point)
            state = run.state()
            if state == "running":
                continue
            self.elsewhere.remove(point)
            ended = state not in ("new", "interrupted") and run.result_file.stat().st_mtime > self.begun
            if not ended and state not in self.done:
                self.todo.append(point)

    def _show(self) -> None:
        """What the runs have printed since, line by line."""
        for run, offset in self.shown.items():
            if run not in self.busy:
                continue
            try:
                with self.sweep.run(self.point[run]).console.open("rb") as file:
                    file.seek(offset)
                    printed = file.read()
            except FileNotFoundError:
                continue
            whole = printed[: printed.rfind(b"\n") + 1]
            self.shown[run] = offset + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                self._tell(self.point[run], line)

    def _tell(self, point: SweepPoint, text: str) -> None:
        self.say(f"[{self.number[point.run]}/{len(self.number)}] {text}")

    @contextmanager
    def _asked_to_stop(self) -> Iterator[None]:
        def ask(number: int, _frame: FrameType | None) -> None:
            self.asked.append(number)

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _several_processes(tree: Mapping[str, Any]) -> bool:
    return tree["distributed"]["name"] != "none"
