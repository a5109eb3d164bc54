"""What a configuration names outside itself: the data's arguments, and the content hashes of a run's identity."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from soup import cache
from soup.errors import Problem, Refused
from soup.model import source
from soup.schema import Config

WHOLE = 2**31 - 1  # tokens that no document has
EMBEDDED = Path(__file__).parent / "embedded"


def data_arguments(config: Config, model_folder: Path) -> dict[str, Any]:
    """Arguments of `soup.data.prepare.prepare`; the embedded set of the task where `data.train` is null."""
    data = config.data
    train, held_out = data.train, data.eval
    if train is None:
        train = str(EMBEDDED / f"{config.task.embedded}.jsonl")
        if held_out is None and data.eval_fraction == 0 and config.task.evaluates:
            held_out = str(EMBEDDED / f"{config.task.embedded}_eval.jsonl")
    return {
        "train": train,
        "eval": held_out,
        "weights": data.weights,
        "eval_fraction": data.eval_fraction,
        "split_seed": config.training.data_seed,
        "format": data.format,
        "shape": config.task.shape,
        "model_folder": model_folder,
        "chat_template": config.model.chat_template,
        # Packing cuts documents where a row is full, and loses nothing of them.
        "max_length": WHOLE if config.training.packing and config.task.shape == "text" else data.max_length,
        "on_bad_row": data.on_bad_row,
        "on_too_long": data.on_too_long,
        "max_samples": data.max_samples,
        "num_proc": data.num_proc,
        "streaming": data.streaming,
        "numbers": ("difficulty",) if config.training.by_difficulty else (),
        "cache": cache.root(),
    }


def content(config: Config, model_folder: Path) -> dict[str, str]:
    """Hashes of what the configuration names: the data as prepared, the model, the files of the task."""
    from soup.data.prepare import fingerprint

    return {
        "data": fingerprint(**data_arguments(config, model_folder)),
        "model": _model_hash(config, model_folder),
        "task": _hash([path for name in config.task.files for path in _within(Path(name).expanduser())]),
    }


def _model_hash(config: Config, model_folder: Path) -> str:
    """Of a hub snapshot its commit; of a folder its files, remembered by size and time of change."""
    if config.model.embedded or model_folder.parent.name == "snapshots":
        return model_folder.name
    return _hash(_within(model_folder))


def _within(path: Path) -> list[Path]:
    """The files of a folder, and of an adapter's those of its base too, if that is a local one."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.is_file())
    adapter = path / "adapter_config.json"
    base = Path(json.loads(adapter.read_text())["base_model_name_or_path"]) if adapter.is_file() else None
    return files + (_within(base) if base is not None and base.is_dir() else [])


def _hash(files: list[Path]) -> str:
    """Of names and content, remembered by size and time of change.

    Raises:
        Refused: a file is not there.
    """
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise Refused(
            Problem(
                key="task",
                value=str(missing[0]),
                why="there is no such file or folder",
                fix="an existing path",
            )
        )
    seen = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    remembered = cache.root() / "hashes" / hashlib.sha256(json.dumps(seen).encode()).hexdigest()
    with cache.entry(remembered) as partial:
        if partial is not None:
            hashes = [[path.name, source.sha256(path)] for path in files]
            (partial / "hash").write_text(hashlib.sha256(json.dumps(hashes).encode()).hexdigest())
    return (remembered / "hash").read_text()
