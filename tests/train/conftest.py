"""Training processes without the wait for imports, and what must be equal in two runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TIMED = (
    "per_s",
    "_runtime",
    "per_second",
    "peak_memory",
    "step_time",
)  # parts of the names of what no two runs share

# Imports what a training process imports, then forks one for each line it reads. Between the two stands a
# process that waits, so that the training process has a parent of its own.
SERVER = """
import json, os, sys
import soup.train.job, soup.train.__main__ as training
import tensorboard, torch.utils.tensorboard, wandb
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if os.fork():
        os.wait()
        print("forked", flush=True)
        continue
    if os.fork():
        os._exit(0)
    pid = os.fork()
    out = asked["out"]
    if pid:
        with open(out + ".pid.partial", "w") as file:
            file.write(str(pid))
        os.replace(out + ".pid.partial", out + ".pid")
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with open(out + ".status.partial", "w") as file:
            file.write(str(status))
        os.replace(out + ".status.partial", out + ".status")
        os._exit(0)
    os.environ.update(asked["environment"])
    terminal = os.open(out, os.O_WRONLY | os.O_CREAT)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    exec(asked["code"])
    os._exit(training.main(asked["words"]))
"""


class Forked:
    """A training process of the server, as far as tests need it like subprocess.Popen."""

    def __init__(self, out: Path):
        self.out = out
        while not Path(f"{out}.pid").exists():
            time.sleep(0.002)
        self.pid = int(Path(f"{out}.pid").read_text())

    @property
    def stdout(self) -> Any:
        return self.out.open()

    def poll(self) -> int | None:
        status = Path(f"{self.out}.status")
        return int(status.read_text()) if status.exists() else None

    def wait(self, timeout_s: float = 120) -> int:
        end = time.monotonic() + timeout_s
        while (status := self.poll()) is None:
            assert time.monotonic() < end, "the process does not end"
            time.sleep(0.005)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Callable[..., Forked]:
    """`server(run)` starts a training process without importing torch once more, one thread.

    `code` is Python that it runs first: a sabotage.
    """
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    folder = tmp_path_factory.mktemp("forked")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=os.environ | threads,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    started: list[Forked] = []

    def fork(run: Any, *words: str, code: str = "", **environment: str) -> Forked:
        out = folder / str(len(started))
        asked = {
            "words": [*words, str(run.folder)],
            "code": code,
            "environment": environment,
            "out": str(out),
        }
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "forked\n"
        started.append(Forked(out))
        return started[-1]

    yield fork
    for one in started:
        one.kill()
    process.stdin.close()
    process.wait(60)


# Becomes the ranks of a run, as torchrun would start them.
RANKS = """
world, port = {world}, {port}
os.environ.update(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT=str(port))
os.environ.update(GLOO_SOCKET_IFNAME="lo", GROUP_RANK="0")
rank, parent, others = 0, os.getppid(), []
for one in range(1, world):
    leader = os.getpid()
    pid = os.fork()
    if pid == 0:
        rank, parent, others = one, leader, []
        break
    others.append(pid)
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
pathlib = __import__("pathlib")
(pathlib.Path(asked["words"][-1]) / ".ranks").mkdir(exist_ok=True)
from soup.train import rank as one_of
try:
    status = one_of.main(["--agent=" + str(parent), *asked["words"]])
finally:
    sys.stdout.flush()
for pid in others:
    status = status or os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
os._exit(status)
"""


@pytest.fixture(scope="session")
def several(server) -> Callable[..., Forked]:
    """`several(run, 2)` starts the processes of a run of several, without importing torch once more and without
    torchrun, which tests/train/test_ranks.py has."""
    import socket

    def fork(run: Any, world: int, *words: str, code: str = "") -> Forked:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        return server(run, *words, code=code + RANKS.format(world=world, port=port))

    return fork


STOP = """
import os, signal
from soup.train.callbacks import Recorder
log = Recorder.on_log
def on_log(self, args, state, control, **rest):
    log(self, args, state, control, **rest)
    if state.global_step == {step}:
        os.kill(os.getpid(), signal.SIGTERM)
Recorder.on_log = on_log
"""


@pytest.fixture(scope="session")
def stop_at() -> Callable[[int], str]:
    """`stop_at(3)`: code by which a training process is asked to stop once it has logged that step."""
    return lambda step: STOP.format(step=step)


@pytest.fixture(scope="session")
def metrics() -> Callable[[Any], list[dict[str, Any]]]:
    """The lines of metrics.jsonl without what is measured in seconds and bytes."""

    def lines(run: Any) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in line.items() if not any(part in key for part in TIMED)}
            for line in run.lines()
        ]

    return lines


@pytest.fixture(scope="session")
def unequal(metrics) -> Callable[[Any, Any], list[str]]:
    """In what two finished runs differ: metrics, each file of weights, optimizer and scheduler."""

    def compared(one: Any, other: Any) -> list[str]:
        import torch

        def same(a: Any, b: Any) -> bool:
            if isinstance(a, dict):
                return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
            if isinstance(a, list | tuple):
                return len(a) == len(b) and all(map(same, a, b))
            return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

        found = [] if metrics(one) == metrics(other) else ["metrics"]
        weights = [
            {path.name: path.read_bytes() for path in run.model.glob("*.safetensors")} for run in (one, other)
        ]
        assert weights[0]
        found += [] if weights[0] == weights[1] else ["weights"]
        values = [one.last_checkpoint() / "value_model.safetensors" for one in (one, other)]  # PPO's
        if values[0].exists() and values[0].read_bytes() != values[1].read_bytes():
            found.append("value model")
        for file in ("optimizer.pt", "scheduler.pt"):
            states = [torch.load(run.last_checkpoint() / file, weights_only=True) for run in (one, other)]
            found += [] if same(*states) else [file]
        return found

    return compared


@pytest.fixture(scope="session")
def whole() -> Callable[[Any], list[str]]:
    """Names of the checkpoints of a run, each of which must be complete and readable."""

    def checked(run: Any) -> list[str]:
        import torch
        from safetensors.torch import load_file

        names = []
        for folder in sorted(Path(run.checkpoints).glob("checkpoint-*")):
            names.append(folder.name)
            state = json.loads((folder / "soup_state.json").read_text())
            assert state["metrics_bytes"] <= run.metrics.stat().st_size
            step = json.loads((folder / "trainer_state.json").read_text())["global_step"]
            assert folder.name == f"checkpoint-{step}"
            for file in ("optimizer.pt", "scheduler.pt"):
                torch.load(folder / file, weights_only=True)
            assert (folder / "rng_state.pth").is_file()
            assert [load_file(path) for path in folder.glob("*.safetensors")]
        return names

    return checked
