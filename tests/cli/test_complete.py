"""Shell completion: commands, groups, choices and keys."""

import os
import shutil
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


@pytest.mark.parametrize(
    ("line", "all_of_them"),
    [
        ("soup runs sh", ["show"]),
        ("soup runs ex", ["export"]),
        ("soup runs show ", ["run.root="]),
        ("soup import so", []),
        ("soup chat lat", []),
    ],
)
def test_what_composes_nothing_is_offered_no_keys(candidates, line, all_of_them):
    """Files are the shell's own to complete."""
    assert candidates(line) == all_of_them


@pytest.mark.parametrize("line", ["soup a=b=c ta", "soup --config-dir /nowhere t", "soup --no-such-flag t"])
def test_a_hopeless_line_has_no_candidates(candidates, line):
    assert "task=" not in candidates(line)


def test_own_choices(candidates, tmp_path):
    (tmp_path / "own/experiment").mkdir(parents=True)
    (tmp_path / "own/experiment/mine.yaml").write_text("# @package _global_\n")
    assert candidates(f"soup --config-dir {tmp_path}/own experiment=min") == ["experiment=mine"]


LINES = {"task=dp": "task=dpo", "optim=galore optim.galore_r": "optim.galore_rank="}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """`soup` and `python -m soup`, as a shell finds them."""
    folder = tmp_path_factory.mktemp("programs")
    program = folder / "soup"
    program.write_text(f"#!{sys.executable}\nfrom soup.cli.main import console\nconsole()\n")
    program.chmod(0o755)
    (folder / "python").symlink_to(sys.executable)
    paths = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
    return os.environ | paths | {"HOME": str(folder), "TERM": "dumb"}


def ask(shell, script, environment):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    flags = ["-f"] if shell == "zsh" else []
    done = subprocess.run(
        [shell, *flags, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout.split() if done.returncode == 0 else pytest.fail(done.stderr)


@pytest.mark.parametrize("program", ["soup", "python -m soup"])
@pytest.mark.parametrize("line", LINES)
def test_bash_completes(program, line, programs):
    script = f"""
        eval "$({program} --shell-completion install=bash)"
        COMP_LINE="{program} {line}" COMP_POINT={len(program) + 1 + len(line)}
        soup_completion
        echo "${{COMPREPLY[@]}}"
    """
    assert LINES[line] in ask("bash", script, programs)


@pytest.mark.parametrize("program", ["soup", "python -m soup"])
@pytest.mark.parametrize("line", LINES)
def test_fish_completes(program, line, programs):
    script = f"{program} --shell-completion install=fish | source; complete -C '{program} {line}'"
    assert LINES[line] in ask("fish", script, programs)


def test_fish_completes_files_where_soup_has_nothing(programs, tmp_path):
    (tmp_path / "mine.yaml").touch()
    script = f"cd {tmp_path}; soup --shell-completion install=fish | source; complete -C 'soup import mi'"
    assert "mine.yaml" in ask("fish", script, programs)


@pytest.mark.parametrize("program", ["soup", "python -m soup"])
@pytest.mark.parametrize("line", LINES)
def test_zsh_completes(program, line, programs):
    """A real terminal: what is typed, a tab, and what stands on the line then."""
    keys = f"{program} {line}\t"
    script = f"""
        zmodload zsh/zpty
        zpty shell zsh -f -i
        zpty -w shell 'PS1=; autoload -Uz compinit; compinit -u; eval "$({program} -sc install=zsh)"; echo RE""ADY'
        zpty -r shell out '*READY*'
        zpty -n -w shell $'{keys.encode("unicode_escape").decode()}'
        typeset all=; repeat 100; do
            sleep 0.1; zpty -r -t shell part && all+=$part
            [[ $all == *'{LINES[line]}'* ]] && break
        done
        print -r -- $all
        zpty -d shell
    """
    assert any(LINES[line] in word for word in ask("zsh", script, programs))
