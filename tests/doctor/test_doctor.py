"""An environment that is broken for real, and what doctor says of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from soup import schema
from soup.cli import doctor as command
from soup.cli.main import main
from soup.device import resolve
from soup.doctor.capabilities import CAPABILITIES, SOUP, STACK, UNSLOTH
from soup.doctor.examine import Finding, disk, examine

BY_NAME = {capability.name: capability for capability in CAPABILITIES}
ASK = """
import json, sys
from dataclasses import asdict
from soup.doctor.capabilities import CAPABILITIES
from soup.doctor.examine import examine, versions
names = sys.argv[2:]
found = examine([one for one in CAPABILITIES if one.name in names], limit_s=float(sys.argv[1]))
print(json.dumps([asdict(one) for one in found if names] + [asdict(versions())]))
"""


def asked(*names: str, limit_s: float = 100, **environment: str) -> dict[str, dict]:
    """Findings of a Python that starts in that environment, by name."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(limit_s), *names],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return {one["name"]: one for one in json.loads(done.stdout)}


def shadowed(folder: Path, module: str, content: str) -> str:
    """A folder for PYTHONPATH whose module is found before the installed one."""
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(content)
    return str(folder)


def test_what_is_here_works():
    found = {
        one.name: one
        for one in examine([BY_NAME[name] for name in ("GaLore", "trackio", "processes", "report", "Optuna")])
    }
    assert {one.state for one in found.values()} == {"works"}, found
    assert not any(one.mend for one in found.values())


def test_a_module_that_hides_a_package_is_broken_and_named(tmp_path):
    path = shadowed(tmp_path / "own", "galore_torch", "raise ImportError('libcudart.so.13: no such file')")
    found = asked("GaLore", PYTHONPATH=path)["GaLore"]
    assert (found["state"], found["mend"]) == ("broken", "unset PYTHONPATH")
    assert "libcudart.so.13" in found["detail"]
    found = asked("GaLore", PYTHONPATH=f"{path}{os.pathsep}{tmp_path}")["GaLore"]
    assert found["mend"] == f"export PYTHONPATH={tmp_path}"


def test_the_package_that_others_import_is_the_one_to_mend(tmp_path):
    """PEFT imports torchao on the way, and neither it nor torch is broken."""
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao/__init__.py").write_text("raise ImportError('libtorchao.so: no such file')")
    about = tmp_path / "torchao-0.18.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.18.0\n")
    (about / "top_level.txt").write_text("torchao\n")
    found = asked("training", PYTHONPATH=str(tmp_path))["training"]
    assert (found["state"], found["detail"]) == ("broken", "ImportError: libtorchao.so: no such file")
    assert found["mend"] == "pip install --force-reinstall --no-deps torchao==0.18.0"


def test_what_is_missing_brings_itself(monkeypatch):
    """Unsloth's own command brings no TRL."""
    monkeypatch.setitem(STACK, "no-such-package", "none")
    one = replace(BY_NAME["Unsloth"], packages={"no-such-package": "none"})
    both = replace(one, packages=one.packages | {"no-such-unsloth": "none"})
    assert [found.mend for found in examine([one, both])] == [SOUP, f"{SOUP} && {UNSLOTH}"]


def test_one_that_imports_and_does_nothing_is_broken(tmp_path):
    """What an import would have called installed."""
    lazy = "import torch\nclass GaLoreAdamW(torch.optim.SGD):\n def __init__(self, p, **_): super().__init__(p)\n"
    path = shadowed(tmp_path / "own", "galore_torch", lazy + " def step(self): pass\n")
    found = asked("GaLore", PYTHONPATH=path)["GaLore"]
    assert found["state"] == "broken" and "changed no weight" in found["detail"]


def test_a_hang_and_a_crash_are_broken(tmp_path):
    path = shadowed(tmp_path / "own", "galore_torch", "import time; time.sleep(600)")
    shadowed(tmp_path / "own", "trackio", "import os; os.kill(os.getpid(), 11)")
    found = asked("GaLore", "trackio", limit_s=8, PYTHONPATH=path)
    assert found["GaLore"]["state"] == "broken" and found["GaLore"]["detail"] == "no answer within 8 s"
    assert found["trackio"]["state"] == "broken" and "SIGSEGV" in found["trackio"]["detail"]


def test_versions_that_do_not_fit(tmp_path):
    assert asked()["versions"]["state"] == "works"
    other = tmp_path / "trl-1.13.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 1.13.0\n")
    found = asked(PYTHONPATH=str(tmp_path))["versions"]
    assert found["state"] == "broken"
    assert "soup-launcher needs trl" in found["detail"] and "1.13.0 is installed" in found["detail"]
    assert found["mend"] == "pip install 'trl<1.13,>=1.12'", "what all ask for, once"


def test_versions_that_do_not_fit_several_packages(tmp_path):
    """Each package once, with what its version is outside of; the command has no bound that another implies."""
    for name, requires in {"unsloth": ("trl!=0.1.5,!=1.12.5,<=1.15,>=0.18",), "trl": ()}.items():
        other = tmp_path / f"{name}-0.9.dist-info"
        other.mkdir()
        asks = "".join(f"Requires-Dist: {one}\n" for one in requires)
        (other / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.9\n{asks}")
    found = asked(PYTHONPATH=str(tmp_path))["versions"]
    told = found["detail"].split("; ")[0]
    assert told.startswith("soup-launcher needs trl>=1.12, unsloth needs trl>=0.18,"), told
    assert told.endswith(" and 0.9 is installed") and found["detail"].count("0.9 is installed") == 2
    assert "'trl!=1.12.5,<1.13,>=1.12'" in found["mend"]


def test_a_path_without_slurm(tmp_path):
    (tmp_path / "python").symlink_to(sys.executable)
    found = asked("SLURM", PATH=str(tmp_path))["SLURM"]
    assert found["state"] == "missing" and found["detail"] == "sinfo is not on PATH"
    assert found["mend"].startswith("apt-get install slurm-client")


@pytest.mark.slow
def test_a_cluster_that_does_not_answer(tmp_path):
    if shutil.which("sinfo") is None:
        pytest.skip("no SLURM here")
    nowhere = tmp_path / "slurm.conf"
    nowhere.write_text("ClusterName=none\nSlurmctldHost=nowhere.invalid\nAuthType=auth/none\n")
    found = asked("SLURM", SLURM_CONF=str(nowhere))["SLURM"]
    assert found["state"] == "broken" and found["mend"].startswith("scontrol ping"), found


def test_the_disk(tmp_path):
    assert disk([tmp_path / "not" / "there"], 1).state == "works"
    full = disk([tmp_path], 10**18)
    assert full.state == "missing" and "1.0 EB are needed" in full.detail
    assert disk([Path("/proc/outputs")], 1).state == "broken"


NEEDS = {
    "": {"training", "CPU", "embedded model"},
    "backend=unsloth": {"Unsloth"},
    "model.quantization=4bit": {"4-bit"},
    "model.quantization=8bit": {"8-bit"},
    "model.quantization=8bit model.quantization_aware=true": {"QAT"},
    "optim=galore lora=none": {"GaLore"},
    "optim=adamw_8bit": {"8-bit optimizer"},
    "optim=paged_adamw_8bit": {"8-bit optimizer"},
    "optim=schedule_free": {"schedule-free"},
    "distributed=ddp": {"processes"},
    "distributed=zero2": {"processes", "DeepSpeed"},
    "distributed=zero3": {"processes", "DeepSpeed"},
    "distributed=zero2_offload": {"processes", "DeepSpeed"},
    "tracking=[wandb,tensorboard]": {"wandb", "tensorboard"},
    "tracking=[mlflow,trackio]": {"mlflow", "trackio"},
    "training.use_liger=true": {"Liger"},
    "training.use_flash_attn=v2": {"FlashAttention 2"},
    "training.use_flash_attn=v3": {"FlashAttention 3"},
    "model.dtype=bfloat16": {"bfloat16"},
    "launch=slurm": {"SLURM"},
}


@pytest.mark.parametrize("overrides", NEEDS)
def test_what_a_configuration_needs(overrides, compose):
    """Every package that a choice requires is exercised by a capability that it needs."""
    config = schema.check(compose("launch.device=cpu", *overrides.split()))
    wanted = [(config, resolve("cpu"))]
    needed = {capability.name for capability in CAPABILITIES if command._needed(capability, wanted)}
    assert needed >= NEEDS[overrides]
    if overrides == "launch=slurm":
        assert needed == {"SLURM"}, "the rest is needed where the job runs"
        return
    tried = {package for name in needed for package in BY_NAME[name].packages}
    assert {package.distribution for spec in config.specs() for package in spec.requires} <= tried


def test_exit_status_and_json(monkeypatch, capsys):
    """1 where the given overrides need what is not here, 0 where they do not."""
    chosen = [BY_NAME["SLURM"], BY_NAME["processes"]]
    monkeypatch.setattr(command, "CAPABILITIES", chosen)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "sinfo is not on PATH" in shown and "apt-get install slurm-client" in shown
    assert main(["doctor", "launch=slurm", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert [(one["name"], one["state"], one["needed"]) for one in told["capabilities"]] == [
        ("versions", "works", True),
        ("disk space", "works", True),
        ("SLURM", "missing", True),
        ("processes", "works", False),
    ]
    assert set(told["capabilities"][0]) == {*asdict(Finding(name="", state="", detail="")), "needed"}
    assert main(["doctor", "lora.rr=1"]) == 2


@pytest.mark.slow
def test_all_of_it_at_once(tmp_path):
    """The whole table on this machine, with Unsloth broken: only who needs it is told so by the exit status."""
    path = shadowed(tmp_path / "own", "unsloth", "raise ImportError('broken')")
    for overrides, status in (([], 0), (["backend=unsloth"], 1)):
        done = subprocess.run(
            [sys.executable, "-m", "soup", "doctor", "--json", *overrides],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        found = {one["name"]: one for one in json.loads(done.stdout)["capabilities"]}
        assert done.returncode == status, found
        assert found["Unsloth"]["state"] == "broken" and found["Unsloth"]["mend"] == "unset PYTHONPATH"
        assert found["training"]["state"] == "works"
