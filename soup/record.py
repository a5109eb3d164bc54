"""Runs on disk: what a run is (its id), where it lies, the state it is in, and files that are whole or absent."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from soup.errors import Problem, RecordError, Refused

NOT_IDENTITY = ("run", "tracking", "launch")
NOT_SPREAD = ("processes", "nodes", "timeout_s")  # of distributed
FINAL = ("finished", "failed", "interrupted", "diverged", "pruned")
DONE = ("finished", "pruned")  # what is never trained again


def run_id(tree: Mapping[str, Any], content: Mapping[str, str]) -> str:
    """The identity of a run: 12 hexadecimal digits.

    `tree`: the resolved configuration. `content`: hashes of what the configuration names, by key
    (`data.train`, `model.base`, a template file). soup's own source is part of every id.
    """
    kept = {key: node for key, node in tree.items() if key not in NOT_IDENTITY}
    kept["distributed"] = {key: value for key, value in tree["distributed"].items() if key not in NOT_SPREAD}
    text = json.dumps([kept, dict(content), source_hash()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def source_hash() -> str:
    """Content hash of the package's own Python source."""
    return hash_of(Path(__file__).parent)


def hash_of(package: Path) -> str:
    """Content hash of the Python source in a folder."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def write(path: Path, text: str) -> None:
    """Replaces a file in one step: it has the old content or the new, whatever happens.

    Raises:
        RecordError: the file cannot be written (a full disk, no permission).
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RecordError(f"{path}: {error.strerror}") from error


def write_json(path: Path, value: Any) -> None:
    """`write` for JSON, indented."""
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Run:
    """A run's folder and the files in it."""

    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def environment(self) -> Path:
        return self.folder / "env.json"

    @property
    def effective(self) -> Path:
        return self.folder / "effective.json"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def result_file(self) -> Path:
        return self.folder / "result.json"

    @property
    def lock_file(self) -> Path:
        return self.folder / ".lock"

    @property
    def console(self) -> Path:
        """What the run said, where it had no terminal of its own."""
        return self.folder / "console.txt"

    def exists(self) -> bool:
        return self.config.is_file()

    def tree(self) -> dict[str, Any]:
        """The frozen configuration."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        try:
            return OmegaConf.to_container(OmegaConf.load(self.config), resolve=True)  # type: ignore[return-value]
        except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
            raise RecordError(f"{self.config}: {error}") from error

    def result(self) -> dict[str, Any] | None:
        """result.json, or `None` before the run has one."""
        return read_json(self.result_file)

    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl; a last line that was cut off by a crash is left out."""
        if not self.metrics.is_file():
            return []
        found = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint: incomplete ones have hidden names."""
        found = [path for path in self.checkpoints.glob("checkpoint-*") if path.is_dir()]
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def state(self) -> str:
        """new, running, interrupted, or what result.json says."""
        return self.look()[0]

    def look(self) -> tuple[str, dict[str, Any] | None]:
        """State and result. Plain strings and system calls, since `soup status` asks this of 10,000 runs."""
        folder = str(self.folder)
        try:
            with open(f"{folder}/result.json", "rb") as file:
                result = json.loads(file.read().decode())
        except FileNotFoundError:
            result = None
        except (OSError, ValueError) as error:
            raise RecordError(f"{self.result_file}: {error}") from error
        if result is not None and result["status"] in DONE:
            return result["status"], result
        if _held(f"{folder}/.lock"):
            return "running", None
        if result is not None:
            return result["status"], result
        return ("interrupted" if os.path.exists(f"{folder}/env.json") else "new"), None

    def running(self) -> bool:
        """Whether a live process holds the run's lock."""
        return _held(str(self.lock_file))

    def finish(self, status: str, **details: Any) -> None:
        """Writes result.json, the last file of a run."""
        write_json(self.result_file, {"status": status, "time": now(), **details})

    def log_tail(self) -> str:
        """The last line of what the training process printed."""
        lines = tail(self.folder / "log.txt").decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


def place(root: Path, identity: str, tree: Mapping[str, Any], *, resume: str) -> Run:
    """The run folder of an identity, with its frozen config.yaml; `resume=never` always makes a new one.

    Raises:
        Refused: `run.root` cannot be written.
    """
    from omegaconf import OmegaConf

    run = Run(root / identity)
    number = 2
    try:
        root.mkdir(parents=True, exist_ok=True)
        ignore = root / ".gitignore"
        if not ignore.exists():
            write(ignore, "*\n")
        while True:
            try:
                run.folder.mkdir()
            except FileExistsError:
                if resume == "auto":
                    break
                run, number = Run(root / f"{identity}.{number}"), number + 1
                continue
            break
        if not run.config.is_file():
            write(run.config, OmegaConf.to_yaml(OmegaConf.create(dict(tree))))
    except (OSError, RecordError) as error:
        raise Refused(
            Problem(key="run.root", value=str(root), why=f"cannot be written: {error}", fix="run.root=FOLDER")
        ) from error
    return run


def find(root: Path, words: list[str]) -> list[Run]:
    """Runs by id, by an unambiguous beginning of it, or `latest`; all of them when no word is given.

    Raises:
        Refused: a word names no run, or several.
    """
    every = sorted(
        (Run(path.parent) for path in root.glob("*/config.yaml")), key=lambda run: run.config.stat().st_mtime
    )
    if not words:
        return every
    chosen, problems = [], []
    for word in words:
        exact = [run for run in every if run.id == word]
        match = exact or [run for run in every if run.id.startswith(word)]
        if word == "latest" and every:
            match = every[-1:]
        if len(match) == 1:
            chosen.extend(match)
        else:
            problems.append(
                Problem(
                    key="run",
                    value=word,
                    why=f"{len(match) or 'no'} runs in {root} have an id that begins so",
                    fix="`python -m soup runs` lists them",
                )
            )
    if problems:
        raise Refused(problems)
    return chosen


def environment() -> dict[str, Any]:
    """Versions, machine and source that a run is made with. Secrets are not among them: no environment variables."""
    import platform
    from importlib.metadata import distributions

    return {
        "time": now(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "source": source_hash(),
        "packages": {item.metadata["Name"]: item.version for item in distributions()},
    }


def tail(path: Path, count: int = 8192) -> bytes:
    """The last bytes of a file; none of one that is not there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - count))
            return file.read()
    except FileNotFoundError:
        return b""


def _held(lock: str) -> bool:
    """Whether a process holds this lock. Asks for a share of it, so that two who ask both hear no."""
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def read_json(path: Path) -> Any:
    """A JSON file, or `None` if there is none.

    Raises:
        RecordError: it is there and is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: {error}") from error


def now() -> str:
    """The time, in UTC and ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
