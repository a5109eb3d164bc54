"""Sweeps of the tiny model as a user starts them, each run on one thread."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


class Shell:
    """`run(*words)` waits for a soup command; `begin(*words)` returns its process, whose output goes to `out`."""

    def __init__(self, tiny_model: Path, folder: Path):
        self.folder, self.root = folder, folder / "runs"
        self.tiny = (
            "model=hub",
            f"model.base={tiny_model}",
            "data.max_length=128",
            "data.num_proc=1",
            "training.batch_size=4",
            "training.max_steps=4",
            "launch.device=cpu",
        )
        self.started: list[subprocess.Popen[str]] = []

    def begin(self, *words: str, tiny: bool = True) -> Any:
        out = self.folder / f"out{len(self.started)}.txt"
        with out.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "soup", *(self.tiny if tiny else ()), *words, f"run.root={self.root}"],
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"COLUMNS": "200"},
            )
        process.out = out
        self.started.append(process)
        return process

    def run(self, *words: str, tiny: bool = True) -> SimpleNamespace:
        process = self.begin(*words, tiny=tiny)
        status = process.wait(300)
        return SimpleNamespace(status=status, out=process.out.read_text())

    def ask(self, *words: str) -> SimpleNamespace:
        """A command that composes nothing."""
        return self.run(*words, tiny=False)


@pytest.fixture
def shell(tiny_model, tmp_path):
    shell = Shell(tiny_model, tmp_path)
    yield shell
    for process in shell.started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    def wait(condition: Callable[[], Any], process: Any = None, timeout_s: float = 180) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            if process is not None and process.poll() is not None:
                pytest.fail(f"the process ended with {process.returncode} before: {process.out.read_text()}")
            assert time.monotonic() < end, "it does not happen"
            time.sleep(0.02)

    return wait


@pytest.fixture(scope="session")
def losses() -> Callable[[Any], list[Any]]:
    """What two equal runs have in common: each step's numbers, and the bytes of the adapter."""

    def found(run: Any) -> list[Any]:
        kept = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "eval_loss")
        lines = [{key: line[key] for key in kept if key in line} for line in run.lines()]
        return [lines, (run.model / "adapter_model.safetensors").read_bytes()]

    return found


@pytest.fixture(scope="session")
def state_of() -> Callable[[str, str], str]:
    """The cell after a point in a table that soup printed."""

    def cell(out: str, point: str) -> str:
        (line,) = [line for line in out.splitlines() if re.match(rf"{re.escape(point)}\s", line)][:1]
        return re.split(r"\s{2,}", line)[1]

    return cell
