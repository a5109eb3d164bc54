"""What is generated is current, and what the README shows composes."""

import importlib.util
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from soup.cli.main import main
from soup.rules import markdown

ROOT = Path(__file__).parent.parent


def test_rules_page_is_current():
    assert (ROOT / "docs/rules.md").read_text() == markdown()


@pytest.fixture(scope="module")
def settings():
    spec = importlib.util.spec_from_file_location("settings_page", ROOT / "docs/settings.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_settings_page_is_current(settings):
    assert (ROOT / "docs/settings.md").read_text() == settings.page(), "make docs"


@pytest.mark.parametrize(
    ("file", "comment", "key"),
    [
        ("optim/lion.yaml", "# weight of the moment in the step's sign (the paper's)", None),
        ("task/kto.yaml", "# lambda_U: weight of answers with a thumb down", "task.undesirable_weight"),
        ("tracking/mlflow.yaml", "# that runs are filed under", "tracking.mlflow.experiment"),
        (
            "config.yaml",
            "# optimizer steps between checkpoints: what a crash can cost",
            "training.save_steps",
        ),
    ],
)
def test_a_key_without_a_comment_fails(settings, tmp_path, file, comment, key):
    conf = shutil.copytree(ROOT / "conf", tmp_path / "conf")
    text = (conf / file).read_text()
    assert comment in text
    (conf / file).write_text(text.replace(comment, ""))
    if key is None:  # another choice of the group says it of the same key
        assert settings.page(conf)
        return
    with pytest.raises(SystemExit, match=f"{re.escape(key)}: has no comment"):
        settings.page(conf)


def test_a_key_without_an_effect_fails(settings, tmp_path):
    conf = shutil.copytree(ROOT / "conf", tmp_path / "conf")
    text = (conf / "config.yaml").read_text()
    (conf / "config.yaml").write_text(text.replace("  epochs:", "  made_up: 1  # a new key\n  epochs:", 1))
    with pytest.raises((SystemExit, KeyError), match="made_up"):
        settings.page(conf)


def test_every_command_of_the_readme_composes(capsys):
    commands = re.findall(r"^    python -m soup (.*?)(?:\s+#.*)?$", (ROOT / "README.md").read_text(), re.M)
    assert len(commands) >= 6
    for command in commands:
        words = [
            word
            for word in shlex.split(command)
            if word not in ("--multirun", "plan", "prove", "data", "why")
        ]
        if words[:1] in (["runs"], ["report"]):
            continue
        sweeps = [word.partition(",")[0] for word in words]
        assert main([*sweeps, "--cfg", "job"]) == 0, command
    capsys.readouterr()
