"""Exit status, and what a process imports."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from soup.cli import main as cli
from soup.errors import RecordError

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")


def _python(*argv, cwd):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=environment, capture_output=True, text=True)


def test_a_refusal_of_a_real_process(tmp_path):
    done = _python("-m", "soup", "lora.rr=8", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[0] == "soup refuses: lora.rr=8: no such key"
    assert list(tmp_path.iterdir()) == []


def test_showing_a_configuration_imports_nothing_heavy(tmp_path):
    program = (
        "import sys; from soup.cli.main import main; status = main(['--cfg', 'job']);"
        f"sys.exit(status or ','.join(name for name in {HEAVY} if name in sys.modules) or 0)"
    )
    done = _python("-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_composing_imports_nothing_heavy(tmp_path):
    program = (
        "import sys; from soup.cli.main import parse; from soup.cli.compose import drive;"
        "drive(parse(['-m', 'lora.r=1,2', 'task=dpo']), len);"
        f"sys.exit(','.join(name for name in (*{HEAVY}, 'rich', 'pydantic') if name in sys.modules) or 0)"
    )
    done = _python("-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (RecordError("outputs/abc"), 1, "soup: outputs/abc"),
        (ModuleNotFoundError("No module named 'x'", name="x"), 2, "fix: pip install soup-launcher"),
        (
            ImportError("libx.so: no such file"),
            2,
            "environment: libx.so: no such file\n    fix: `soup doctor`",
        ),
    ],
    ids=repr,
)
def test_status_of_what_a_command_raises(shell, monkeypatch, error, status, said):
    def fail(_points, _args):
        raise error

    monkeypatch.setitem(sys.modules, "failing", SimpleNamespace(fail=fail))
    monkeypatch.setitem(cli.COMMANDS, "run", cli.Command("failing:fail", "fails"))
    result = shell.run()
    assert result.status == status
    assert said in result.err
    assert "Traceback" not in result.err


def test_without_hydra_every_command_says_what_is_missing(tmp_path):
    program = "import sys; sys.modules['hydra'] = None; from soup.cli.main import console; console()"
    for words in (["plan"], ["doctor"], []):
        done = _python("-c", program, *words, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.splitlines()[1] == "    fix: pip install soup-launcher", done.stderr


def test_the_status_of_a_command_is_returned(shell):
    shell.status = 1
    assert shell.run("lora.r=3").status == 1


def test_a_closed_pipe_is_quiet(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "soup", "--cfg", "all"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_planning_imports_nothing_heavy(tmp_path):
    program = (
        "import sys; from soup.cli.main import main; status = main(['plan']);"
        f"sys.exit(status or ','.join(name for name in {HEAVY} if name in sys.modules) or 0)"
    )
    done = _python("-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
