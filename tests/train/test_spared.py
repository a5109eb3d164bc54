"""A run's process goes without the libraries that its settings do not need, and with those that they do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from soup.schema import check
from soup.train import spared

NEEDED = {
    "optim=galore lora=none": "galore_torch",
    "optim=adamw_8bit": "bitsandbytes",
    "optim=schedule_free": "schedulefree",
    "model.quantization=8bit": "bitsandbytes",
    "model.quantization=4bit model.quantization_aware=true": "torchao",
    "distributed=zero2": "deepspeed",
    "tracking=wandb": "wandb",
    "tracking=mlflow": "mlflow",
    "tracking=trackio": "trackio",
    "backend=unsloth": "bitsandbytes",
}
PROGRAM = "import sys, importlib; from soup.train import spared; spared.absent(sys.argv[2].split()); "
PROGRAM += "importlib.import_module(sys.argv[1])"


def imports(module, absent):
    """The status of a process that goes without some libraries, and what it says."""
    words = [sys.executable, "-c", PROGRAM, module, " ".join(absent)]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", NEEDED)
def test_what_a_setting_needs_can_be_imported(tree, words):
    status, said = imports(NEEDED[words], spared.unused(check(tree(*words.split()))))
    assert status == 0, said


def test_what_none_needs_cannot(tree):
    absent = spared.unused(check(tree()))
    assert absent == set(spared.MODULES)
    status, said = imports("wandb", absent)
    assert status == 1 and "import of wandb halted; None in sys.modules" in said


def test_what_others_import_is_theirs_to_say(tree, tmp_path):
    rewards = tmp_path / "rewards.py"
    rewards.write_text("import wandb\n\ndef always(**_): return 1.0\n")
    for words in (["backend=unsloth"], ["task=grpo", f"task.rewards=[{rewards}:always]"]):
        assert spared.unused(check(tree(*words))) == {"deepspeed"}
