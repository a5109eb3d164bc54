"""Shell completion: commands, groups, choices and keys."""

import os
import subprocess
import sys

import pytest


@pytest.fixture
def candidates(shell, monkeypatch):
    def complete(line):
        monkeypatch.setenv("COMP_LINE", line)
        result = shell.run("-sc", "query=bash")
        assert (result.status, result.err) == (0, "")
        return result.out.split()

    return complete


@pytest.mark.parametrize("program", ["soup", "/usr/bin/soup", "python -m soup", ".venv/bin/python3 -m soup"])
def test_each_way_to_call_it(candidates, program):
    assert candidates(f"{program} task=d") == ["task=dpo"]


@pytest.mark.parametrize(
    ("line", "among"),
    [
        ("soup pl", "plan"),
        ("soup plan lora.r", "lora.r="),
        ("soup --multirun lora.r=1,2 opt", "optim="),
        ("soup optim=galore optim.galore_r", "optim.galore_rank="),
        ("soup tra", "training."),
        ("soup ", "model="),
    ],
)
def test_candidates(candidates, line, among):
    assert among in candidates(line)


@pytest.mark.parametrize("line", ["soup a=b=c ta", "soup --config-dir /nowhere t", "soup --no-such-flag t"])
def test_a_hopeless_line_has_no_candidates(candidates, line):
    assert "task=" not in candidates(line)


def test_own_choices(candidates, tmp_path):
    (tmp_path / "own/experiment").mkdir(parents=True)
    (tmp_path / "own/experiment/mine.yaml").write_text("# @package _global_\n")
    assert candidates(f"soup --config-dir {tmp_path}/own experiment=min") == ["experiment=mine"]


def test_the_script_for_python_m_completes_in_bash():
    script = """
        eval "$($PYTHON -m soup --shell-completion install=bash)"
        COMP_LINE="$PYTHON -m soup lora.alp" COMP_CWORD=3
        soup_module_completion
        echo "${COMPREPLY[@]}"
    """
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "lora.alpha="
