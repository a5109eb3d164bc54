"""Each mistake on a command line gives one readable message, status 2, and nothing on disk."""

import pytest

CASES = {
    "unknown key": (["lora.rr=8"], "lora.rr=8: no such key", "did you mean lora.r?"),
    "key without its section": (["lr=1e-4"], "lr=1e-4: no such key", "did you mean optim.lr?"),
    "key of another choice": (
        ["optim.galore_rank=8"],
        "optim.galore_rank=8: no such key",
        "optim=galore has it",
    ),
    "key of another task": (["task.gamma=1"], "task.gamma=1: no such key", "task=ppo, task=simpo have it"),
    "unknown section": (["trainig.epochs=1"], "trainig.epochs=1: no such key", "training.epochs"),
    "unknown choice": (["task=dpoo"], "task=dpoo: no such choice", "did you mean task=dpo? choices: dpo, "),
    "unknown choice in a list": (
        ["tracking=[wandb,tensorbord]"],
        "tracking=tensorbord",
        "tracking=tensorboard",
    ),
    "a choice that is no name": (["task=3"], "task=3: a choice is a name", "one of: "),
    "no choice": (["task=null"], "task=null: a choice is a name", "one of: "),
    "several choices where one fits": (["task=[dpo,sft]"], "task=[dpo,sft]", "task=dpo,sft runs each"),
    "unknown group": (["tasks=dpo"], "tasks=dpo: no such key", "did you mean task?"),
    "unknown nested group": (["task/foo=dpo"], "task/foo=dpo: no such group", "groups: task, "),
    "unknown Hydra group": (["hydra/sweper=basic"], "hydra/sweper=basic: no such group", "groups: "),
    "a group at another place": (["task@here=dpo"], "task@here=dpo", "fix: "),
    "unknown experiment": (["experiment=quikstart"], "experiment=quikstart", "experiment=quickstart"),
    "+ on an unknown experiment": (
        ["+experiment=quikstart"],
        "experiment=quikstart",
        "experiment=quickstart",
    ),
    "missing configuration": (["--config-name", "confg"], "--config-name=confg", "one of: config"),
    "missing folder": (["--config-dir", "nowhere"], "--config-dir=nowhere: no such folder", "fix: "),
    "missing main folder": (["--config-path", "nowhere"], "--config-path=nowhere: no such folder", "fix: "),
    "missing search path": (["hydra.searchpath=[/nowhere]"], "path=/nowhere is not available", "fix: "),
    "missing value": (["model=hub"], "model.base=???: has no value", "give model.base=..."),
    "dead interpolation": (["lora.r=${no.such}"], "lora.r=${no.such}: Interpolation key", "fix: "),
    "circular interpolation": (["lora.r=${lora.r}"], "lora.r=", "interpolation"),
    "broken interpolation": (["lora.r=${"], "lora.r=${", "fix: "),
    "unknown resolver": (["lora.r=${nothing:1}"], "lora.r=${nothing:1}: Unsupported interpolation", "fix: "),
    "two equals signs": (["run.name=a=b"], "run.name=a=b: cannot be read", "'run.name=\"a=b\"'"),
    "open bracket": (["tracking=[wandb"], "tracking=[wandb: cannot be read", "quote it"),
    "open quote": (["run.name='a"], "run.name='a: cannot be read", "quote it"),
    "no key": (["=8"], "=8: is not of the form key=value", "write key=value"),
    "a stray word": (["lora.r", "=", "8"], "lora.r: neither a command nor key=value", "fix: "),
    "a sweep without --multirun": (["lora.r=1,2"], "lora.r=1,2: several values make a sweep", "--multirun"),
    "a range without --multirun": (["lora.r=range(1,3)"], "lora.r=range(1,3): several", "add --multirun"),
    "deleting what is not there": (["~lora.rr"], "~lora.rr: no such key", "lora.r"),
    "adding what is there": (["+lora.r=8"], "+lora.r=8: this key is there already", "drop the +: lora.r=8"),
    "adding a chosen group": (["+task=dpo"], "+task=dpo: this group has a choice", "drop the +: task=dpo"),
    "a contradicting name": (
        ["task=dpo", "task.name=sft"],
        "task.name=sft: contradicts task=dpo",
        "task=...",
    ),
    "a nested contradicting name": (
        ["tracking=wandb", "tracking.wandb.name=none"],
        "tracking.wandb.name=none: contradicts tracking=wandb",
        "tracking=...",
    ),
    "a launcher by hand": (["hydra/launcher=basic"], "hydra/launcher=basic: launch=local runs", "drop it"),
    "a setting of Hydra that soup ignores": (
        ["hydra.run.dir=x"],
        "hydra.run.dir=x: soup does not read",
        "drop",
    ),
    "a bad flag": (["--cfg", "jb"], "command line: argument --cfg", "soup --help"),
    "an unknown section to show": (
        ["--cfg", "job", "-p", "nope"],
        "--package=nope: no such section",
        "fix: ",
    ),
    "nothing to complete": (["--shell-completion"], "--shell-completion", "install=bash"),
    "an unknown shell": (["--shell-completion", "install=csh"], "install=csh: no such shell", "one of: bash"),
}


@pytest.mark.parametrize(("argv", "problem", "fix"), CASES.values(), ids=CASES)
def test_one_readable_message(shell, argv, problem, fix):
    result = shell.run(*argv)
    assert result.status == 2
    assert result.out == ""
    assert result.err.startswith("soup refuses")
    assert problem in result.err
    assert fix in result.err
    assert "Traceback" not in result.err
    assert len(result.err.splitlines()) <= 5
    assert shell.calls == []


def test_all_mistakes_are_reported_together(shell):
    argv = ["lora.rr=8", "lora.alfa=1", "task=dpoo", "x=a=b", "+lora.r=1", "lora.r=1,2", "--cfg", "job"]
    result = shell.run(*argv)
    assert result.status == 2
    assert result.err.startswith("soup refuses, for 6 reasons:")
    for word in argv[:6]:
        assert word in result.err


def test_all_missing_and_dead_values_are_reported_together(shell):
    result = shell.run("model=hub", "lora.r=${a.b}", "lora.alpha=${c.d}")
    for key in ("model.base", "lora.r", "lora.alpha"):
        assert key in result.err


def test_a_repeated_mistake_of_a_sweep_is_reported_once(shell):
    result = shell.run("--multirun", "lora.r=1,2,3", "model=hub,smollm2")
    assert result.err.count("model.base") == 2  # the problem and its fix


def test_what_composes_is_not_refused(shell):
    (point,) = shell.points("task=dpo", "backend=unsloth", "lora=dora")
    assert point.choices["task"] == "dpo"
    assert point.tree["lora"]["use_dora"] is True
    assert "hydra" not in point.tree
    assert point.overrides == ("task=dpo", "backend=unsloth", "lora=dora")


def test_a_group_with_several_choices(shell):
    (point,) = shell.points("tracking=[wandb,tensorboard]")
    assert point.choices["tracking"] == ["wandb", "tensorboard"]
    assert set(point.tree["tracking"]) == {"wandb", "tensorboard"}


def test_plan_takes_what_would_run_elsewhere(shell):
    (point,) = shell.points("plan", "launch=slurm")
    assert point.tree["launch"]["name"] == "slurm"
