"""A copy of soup's code, and what it ran with: jobs that wait in a queue run this, whatever becomes of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from soup.errors import Problem, Refused
from soup.record import environment, hash_of, source_hash, write, write_json

PACKAGE = Path(__file__).parent
CHECKOUT = PACKAGE.parent


def take(folder: Path) -> Path:
    """Copies soup to `<folder>/<hash of its source>/` unless it is there; returns that folder, for PYTHONPATH.

    Beside the code lie `environment.json` (versions, machine, git commit) and `changes.diff` (what is not committed).

    Raises:
        Refused: the source was edited while this process ran, so that a copy would not be what was checked.
    """
    target = folder / source_hash()[:12]
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        _copy(PACKAGE, partial / "soup")
        if (CHECKOUT / "conf").is_dir() and not (PACKAGE / "conf").is_dir():
            _copy(CHECKOUT / "conf", partial / "conf")
        _copy(_launchers(), partial / "hydra_plugins" / "soup_launchers")
        if hash_of(partial / "soup") != source_hash():
            why = "soup's own source changed while this command ran, so its runs would not be those checked"
            raise Refused(Problem(key="launch", value="slurm", why=why, fix="give the command again"))
        commit, changes = _git()
        write_json(partial / "environment.json", environment() | {"commit": commit})
        write(partial / "changes.diff", changes)
        partial.chmod(0o755)
        try:
            os.replace(partial, target)
        except OSError:
            if not target.is_dir():  # another process was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _launchers() -> Path:
    from importlib.util import find_spec

    return Path(find_spec("hydra_plugins.soup_launchers").origin).parent  # type: ignore[union-attr,arg-type]


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))


def _git() -> tuple[str | None, str]:
    """Commit, and what is changed beside it; nothing outside a checkout of soup's own."""
    git = ["git", "-C", str(CHECKOUT)]
    try:
        top = subprocess.run(
            [*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True
        )
        if Path(top.stdout.strip()) != CHECKOUT:
            return None, ""  # installed below somebody else's repository
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        changes = subprocess.run([*git, "diff", "HEAD"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None, ""
    return commit.strip(), changes.decode(errors="replace")
