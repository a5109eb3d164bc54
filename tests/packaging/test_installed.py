"""soup as installed: from a wheel and from an editable install, called from another folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
LAUNCHER = "import sys; from soup.cli.main import parse; from soup.cli.compose import drive; " + (
    "print(drive(parse(['--multirun', 'lora.r=1,2']), len))"
)


def _run(*command, cwd, **environment):
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is packaged, because a build leaves files beside its source."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("soup", "conf", "launchers"):
        shutil.copytree(CHECKOUT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        if (CHECKOUT / name).exists():
            shutil.copy(CHECKOUT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), ".")
    _run(*pip, cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder that the wheel was installed into, the only one on PYTHONPATH."""
    target = tmp_path_factory.mktemp("installed")
    _run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel), cwd=target)
    return target


@pytest.fixture(scope="module")
def editable(source, tmp_path_factory):
    """An environment with an editable install, and the dependencies of this one."""
    folder = tmp_path_factory.mktemp("editable")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(
        _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install")
    _run(*pip, "--no-deps", "--no-build-isolation", "--editable", str(source), cwd=folder)
    return python


def test_the_wheel_holds_everything(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"soup/{path.relative_to(CHECKOUT)}" for path in CHECKOUT.glob("conf/**/*.yaml")} <= names
    assert {str(path.relative_to(CHECKOUT)) for path in CHECKOUT.glob("soup/**/*.py")} <= names
    assert {str(path.relative_to(CHECKOUT)) for path in CHECKOUT.glob("soup/embedded/*")} <= names
    carried = {str(path.relative_to(CHECKOUT)) for path in CHECKOUT.glob("soup/model/configs/*")}
    assert carried and carried <= names
    assert {f"hydra_plugins/soup_launchers/{path.name}" for path in CHECKOUT.glob("launchers/*.py")} <= names
    assert {f"soup/report/page/page.{kind}" for kind in ("html", "css", "js")} <= names
    assert "soup/py.typed" in names


def test_the_wheel_composes_from_another_folder(installed, tmp_path):
    shown = _run(sys.executable, "-m", "soup", "--cfg", "job", cwd=tmp_path, PYTHONPATH=str(installed))
    assert yaml.safe_load(shown)["task"]["name"] == "sft"
    assert list(tmp_path.iterdir()) == []


def test_the_wheel_takes_own_configs(installed, tmp_path):
    (tmp_path / "own/experiment").mkdir(parents=True)
    (tmp_path / "own/experiment/mine.yaml").write_text("# @package _global_\nlora: {r: 5}\n")
    line = ("+experiment=mine", "--config-dir", "own", "--cfg", "job")
    shown = _run(sys.executable, "-m", "soup", *line, cwd=tmp_path, PYTHONPATH=str(installed))
    assert yaml.safe_load(shown)["lora"]["r"] == 5


def test_the_wheel_launches(installed, tmp_path):
    assert _run(sys.executable, "-c", LAUNCHER, cwd=tmp_path, PYTHONPATH=str(installed)).strip() == "2"


def test_another_hydra_application_runs_beside_the_wheel(installed, tmp_path):
    app = tmp_path / "app.py"
    app.write_text("import hydra\n@hydra.main(version_base=None)\ndef main(cfg): pass\nmain()\n")
    _run(sys.executable, str(app), "--cfg", "job", "+a=1", cwd=tmp_path, PYTHONPATH=str(installed))


def test_the_editable_install(editable, tmp_path):
    console = str(editable.parent / "soup")
    assert "r: 3" in _run(console, "lora.r=3", "--cfg", "job", cwd=tmp_path)
    assert _run(str(editable), "-c", LAUNCHER, cwd=tmp_path).strip() == "2"
