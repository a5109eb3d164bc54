"""Hydra's flags work as Hydra's users expect."""

import yaml


def test_cfg_job(shell):
    result = shell.run("task=dpo", "--cfg", "job")
    tree = yaml.safe_load(result.out)
    assert result.status == 0
    assert tree["task"]["name"] == "dpo"
    assert "hydra" not in tree


def test_cfg_of_one_section(shell):
    result = shell.run("-c", "job", "-p", "lora", "lora.r=3")
    assert result.out.startswith("# @package lora\n")
    assert yaml.safe_load(result.out)["r"] == 3


def test_cfg_resolved(shell):
    assert "r: 32.0" in shell.run("-c", "job", "-p", "lora", "lora.r=${lora.alpha}", "--resolve").out
    assert "r: ${lora.alpha}" in shell.run("-c", "job", "-p", "lora", "lora.r=${lora.alpha}").out
    result = shell.run("-c", "job", "lora.r=${no.such}", "--resolve")
    assert result.status == 2
    assert "lora.r" in result.err


def test_cfg_hydra(shell):
    assert "job_logging" in shell.run("--cfg", "hydra").out


def test_info(shell):
    result = shell.run("--info", "defaults-tree", "task=dpo")
    assert result.status == 0
    assert "task: dpo" in result.out


def test_info_refuses_what_does_not_compose(shell):
    result = shell.run("--info", "task=dpoo")
    assert result.status == 2
    assert "task=dpoo: no such choice" in result.err


def test_version(shell):
    assert shell.run("--version").out.startswith("soup ")


def test_help_fits_a_screen_and_names_every_group(shell):
    lines = shell.run("--help").out.splitlines()
    assert len(lines) < 24 and max(map(len, lines)) <= 80
    groups = (
        "model",
        "data",
        "task",
        "backend",
        "lora",
        "optim",
        "distributed",
        "longctx",
        "tracking",
        "launch",
    )
    for group in (*groups, "experiment"):
        assert any(f"  {group} " in line for line in lines), group


def test_hydra_help(shell):
    assert "Hydra" in shell.run("--hydra-help", "task=dpo").out
