"""Exercises capabilities, as many at a time as there are cores; what does not answer in time is broken."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from soup.device import cores
from soup.doctor.capabilities import SOUP, STACK, Capability

if TYPE_CHECKING:
    from packaging.specifiers import Specifier, SpecifierSet

LIMIT_S = 120.0  # of one capability, most of it imports; on two idle cores the slowest takes 20


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`state`: works, missing or broken. `mend`: the command that would make it work, empty where it does."""

    name: str
    state: str
    detail: str
    mend: str = ""
    seconds: float = 0.0


def examine(
    capabilities: Sequence[Capability],
    *,
    limit_s: float = LIMIT_S,
    done: Callable[[Finding], None] = lambda _: None,
) -> list[Finding]:
    """A finding for each capability, in their order; `done` is called as each is found."""
    with ThreadPoolExecutor(max_workers=cores()) as pool:

        def one(capability: Capability) -> Finding:
            finding = _absent(capability) or _exercised(capability, limit_s)
            done(finding)
            return finding

        return list(pool.map(one, capabilities))


def _absent(capability: Capability) -> Finding | None:
    """What its packages' metadata say is not installed: nothing needs to be started for that."""
    lacking = [name for name in capability.packages if _version(name) is None]
    if not lacking:
        return None
    why = f"{', '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not installed"
    mends = dict.fromkeys(SOUP if name in STACK else capability.install for name in lacking)
    return Finding(name=capability.name, state="missing", detail=why, mend=" && ".join(mends))


def _exercised(capability: Capability, limit_s: float) -> Finding:
    """What its function says in a process group of its own, which is gone when this returns."""
    begun = monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "soup.doctor.checks", capability.function],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    try:
        out, err = process.communicate(timeout=limit_s)
        found = _answer(out, err, process.returncode)
    except subprocess.TimeoutExpired:
        found = {"state": "broken", "detail": f"no answer within {limit_s:g} s"}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    module = found.pop("module", "")
    if found["state"] == "broken":
        found["mend"] = found.get("mend") or _mend(capability, found["detail"], module)
    return Finding(name=capability.name, seconds=round(monotonic() - begun, 1), **found)


def _answer(out: bytes, err: bytes, status: int) -> dict[str, str]:
    try:
        return dict(json.loads(out))
    except ValueError:
        last = (err.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        ended = signal.Signals(-status).name if status < 0 else f"status {status}"
        return {"state": "broken", "detail": f"its process ended with {ended}: {last}"}


def _mend(capability: Capability, why: str, failed: str) -> str:
    """The command that puts a broken package right: away with what hides it, or the package once more.

    `failed`: the module that could not be imported, if that is what happened.
    """
    by_module = {module: name for name, module in capability.packages.items()}
    if failed and failed not in by_module:
        names = packages_distributions().get(failed)
        if names is None:
            return f"pip install {failed}"
        by_module[failed] = names[0]
    for module, name in by_module.items():
        if (hiding := _hiding(name, module)) is not None:
            return _unhide(hiding)
    if capability.name == "SLURM":
        return (
            "scontrol ping  # which controller does not answer; then there: systemctl restart munge slurmctld"
        )
    named = [
        name
        for module, name in by_module.items()
        if module == failed or (not failed and re.search(rf"\b({module}|{re.escape(name)})\b", why))
    ]
    chosen = named[-1] if named else list(capability.packages)[-1]
    return f"pip install --force-reinstall --no-deps {chosen}=={(_version(chosen) or '').partition('+')[0]}"


def _hiding(name: str, module: str) -> Path | None:
    """The file that is imported in the place of an installed package, `None` where it is the package's own."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    origin, home = Path(spec.origin).resolve(), Path(str(distribution(name).locate_file(""))).resolve()
    return None if origin.is_relative_to(home) else origin


def _unhide(hiding: Path) -> str:
    above = hiding.parent.parent if hiding.name == "__init__.py" else hiding.parent
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = [path for path in paths if path and Path(path).resolve() != above]
    if len(kept) < len([path for path in paths if path]):
        return f"export PYTHONPATH={shlex.quote(os.pathsep.join(kept))}" if kept else "unset PYTHONPATH"
    target = hiding.parent if hiding.name == "__init__.py" else hiding
    return f"mv {shlex.quote(str(target))} {shlex.quote(str(target) + '.away')}"


def _version(name: str) -> str | None:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def disk(folders: Iterable[Path], needed_bytes: int) -> Finding:
    """Whether runs and the cache can be written, and have room for what is planned."""
    import shutil

    from soup.cli.table import size

    said = []
    for folder in folders:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        probe = there / f".soup-doctor-{os.getpid()}"
        try:
            probe.write_bytes(bytes(1 << 20))
            probe.unlink()
        except OSError as error:
            probe.unlink(missing_ok=True)
            why = f"{folder} cannot be written: {error.strerror}"
            mend = "soup run.root=FOLDER, SOUP_CACHE=FOLDER for the cache"
            return Finding(name="disk space", state="broken", detail=why, mend=mend)
        free = shutil.disk_usage(there).free
        said.append(f"{size(free)} free for {folder}")
        if free < needed_bytes:
            why = f"{said[-1]}, and {size(needed_bytes)} are needed"
            return Finding(
                name="disk space", state="missing", detail=why, mend=f"du -sh {shlex.quote(str(there))}/*"
            )
    return Finding(name="disk space", state="works", detail="; ".join(said))


# Requirements that do not hold in the set of versions that the tests ran with, and do no harm there.
HARMLESS = {
    ("unsloth", "certifi"): "asks for one newer than an index may have",
    ("unsloth-zoo", "certifi"): "the same",
}


def versions() -> Finding:
    """Whether the installed packages that soup builds on fit together, as their own metadata say."""
    from packaging.specifiers import SpecifierSet

    wrong = list(_mismatches())
    if not wrong:
        return Finding(name="versions", state="works", detail="installed packages accept one another")
    asked: dict[tuple[str, str], list[str]] = {}
    wanted: dict[str, SpecifierSet] = {}
    for by, name, ranges, found in wrong:
        failing = ",".join(str(one) for one in ranges if not one.contains(found, prereleases=True))
        asked.setdefault((name, found), []).append(f"{by} needs {name}{failing}")
        wanted[name] = wanted.get(name, SpecifierSet()) & ranges
    detail = "; ".join(f"{', '.join(needs)}, and {found} is installed" for (_, found), needs in asked.items())
    words = " ".join(shlex.quote(f"{name}{_tightest(ranges)}") for name, ranges in wanted.items())
    return Finding(name="versions", state="broken", detail=detail, mend=f"pip install {words}")


def _tightest(ranges: SpecifierSet) -> SpecifierSet:
    """The same range without bounds that others imply."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    def bounds(*operators: str) -> list[Specifier]:
        found = [one for one in ranges if one.operator in operators]
        return sorted(found, key=lambda one: (Version(one.version), one.operator))

    ends = [*bounds(">=")[-1:], *bounds("<", "<=")[:1]]
    within = SpecifierSet(",".join(map(str, ends)))
    rest = [
        one
        for one in ranges
        if one.operator not in (">=", "<", "<=", "!=")
        or (one.operator == "!=" and within.contains(one.version.removesuffix(".*"), prereleases=True))
    ]
    return SpecifierSet(",".join(map(str, [*ends, *rest])))


def _mismatches() -> Iterator[tuple[str, str, SpecifierSet, str]]:
    """(who asks, what for, in which versions, what is there) among soup's requirements, extras included, and theirs."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    seen: set[str] = set()
    waiting = ["soup-launcher", "unsloth", "unsloth_zoo"]
    while waiting:
        by = canonicalize_name(waiting.pop(0))
        if by in seen or _version(by) is None:
            continue
        seen.add(by)
        for requirement in map(Requirement, distribution(by).requires or []):
            name, extras = canonicalize_name(requirement.name), ("",)
            if by == "soup-launcher":
                extras = ("", *distribution(by).metadata.get_all("Provides-Extra", []))
            applies = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in extras
            )
            found = _version(name)
            if not applies or found is None:
                continue
            if (by, name) not in HARMLESS and not requirement.specifier.contains(found, prereleases=True):
                yield by, name, requirement.specifier, found
            waiting.append(name)
