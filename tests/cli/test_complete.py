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


@pytest.fixture
def some_files(candidates, tmp_path, monkeypatch):  # noqa: ARG001 - whose shell is to be in its own folder first
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    for name in ("rows.jsonl", "rest.csv", ".hidden.jsonl", "two words.jsonl", "sub/one.jsonl", "dpo"):
        (folder / name).touch()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("line", "all_of_them"),
    [
        ("soup data.train=ro", ["data.train=rows.jsonl"]),
        (
            "soup plan data.train=",
            ["data.train=dpo", "data.train=rest.csv", "data.train=rows.jsonl", "data.train=sub/"],
        ),
        ("soup data.train=.h", ["data.train=.hidden.jsonl"]),
        ("soup data.train=./s", ["data.train=./sub/"]),
        ("soup data.eval=sub/", ["data.eval=sub/one.jsonl"]),
        ("soup model=hub model.base=su", ["model.base=sub/"]),
        ("soup data.train=[rows.jsonl,re", ["data.train=[rows.jsonl,rest.csv"]),
        ("soup -m data.train=rows.jsonl,re", ["data.train=rows.jsonl,rest.csv"]),
        ("soup report run.root=su", ["run.root=sub/"]),
        ("soup task=dp", ["task=dpo"]),
        ("soup data.train=none/", []),
    ],
)
def test_values_complete_as_files(candidates, some_files, line, all_of_them):  # noqa: ARG001
    assert candidates(line) == all_of_them


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
    script = script.replace("import mi", "data.train=mi")
    assert "data.train=mine.yaml" in ask("fish", script, programs)


def test_bash_completes_files_after_a_key(programs, tmp_path):
    (tmp_path / "mine.jsonl").touch()
    script = f"""
        cd {tmp_path}
        eval "$(soup --shell-completion install=bash)"
        COMP_LINE="soup data.train=mi" COMP_POINT=18
        soup_completion
        echo "${{COMPREPLY[@]}}"
    """
    assert ask("bash", script, programs) == ["data.train=mine.jsonl"]


@pytest.mark.parametrize("program", ["soup", "python -m soup"])
@pytest.mark.parametrize("line", LINES)
def test_zsh_completes(program, line, programs):
    assert typed_in_zsh(f"{program} {line}", program, LINES[line], programs)


def test_zsh_completes_files_after_a_key(programs, tmp_path):
    (tmp_path / "mine.jsonl").touch()
    assert typed_in_zsh("soup data.train=mi", "soup", "data.train=mine.jsonl", programs, f"cd {tmp_path};")


def typed_in_zsh(line, program, wanted, programs, first=""):
    """A real terminal: what is typed, a tab, and whether what stands on the line then has what is wanted."""
    keys = f"{line}\t"
    script = f"""
        zmodload zsh/zpty
        zpty shell zsh -f -i
        zpty -w shell '{first} PS1=; autoload compinit; compinit -u; eval "$({program} -sc install=zsh)"; echo RE""ADY'
        zpty -r shell out '*READY*'
        zpty -n -w shell $'{keys.encode("unicode_escape").decode()}'
        typeset all=; repeat 100; do
            sleep 0.1; zpty -r -t shell part && all+=$part
            [[ $all == *'{wanted}'* ]] && break
        done
        print -r -- $all
        zpty -d shell
    """
    return any(wanted in word for word in ask("zsh", script, programs))
