"""Command lines in this process, in an empty folder, with a command that records the points it is given."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from soup.cli import main as cli


@dataclass
class Shell:
    """`run(*argv)` gives status, stdout and stderr; `calls` has the points of each call of an action."""

    capsys: Any
    calls: list[Any] = field(default_factory=list)
    status: int = 0

    def run(self, *argv: str) -> SimpleNamespace:
        self.capsys.readouterr()
        status = cli.main(argv)
        captured = self.capsys.readouterr()
        return SimpleNamespace(status=status, out=captured.out, err=captured.err)

    def points(self, *argv: str) -> Any:
        self.calls.clear()
        result = self.run(*argv)
        assert result.status == self.status, result.err
        (points,) = self.calls
        return points


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    """A shell in an empty folder, whose `run`, `plan` and `why` record points and do nothing else."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    shell = Shell(capsys)

    def record(points, _args):
        shell.calls.append(points)
        return shell.status

    monkeypatch.setitem(sys.modules, "recording", SimpleNamespace(record=record))
    for name in ("run", "plan", "why"):
        command = cli.Command("recording:record", "records", json=name == "plan")
        monkeypatch.setitem(cli.COMMANDS, name, command)
    yield shell
    assert list(place.iterdir()) == [], "a command line made files"
