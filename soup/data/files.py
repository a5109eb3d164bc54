"""Which files `data.train` or `data.eval` names: a file, a folder, a glob, a hub name, or several of them."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from soup.errors import Problem, Refused

_TEXTS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".md", ".text")
SUFFIXES = (*_TEXTS, ".parquet", *(f"{suffix}.gz" for suffix in _TEXTS))  # `read.READERS` reads each
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPLIT = {
    "data.train": re.compile(r"(^|[^a-z])train", re.I),
    "data.eval": re.compile(r"(^|[^a-z])(validation|valid|val|dev|eval|test)", re.I),
}


def resolve_files(train: str | Sequence[str], *, key: str = "data.train") -> list[Path]:
    """The files of all sources that `train` names, in order."""
    return [file for source in resolve_sources(train, key=key) for file in source]


def source_names(train: str | Sequence[str]) -> list[str]:
    """The sources that `train` names: a list, or names separated by commas."""
    names = [train] if isinstance(train, str) else list(train)
    if len(names) == 1 and "," in names[0] and not Path(names[0]).expanduser().exists():
        names = [name.strip() for name in names[0].split(",")]
    return names


def resolve_sources(train: str | Sequence[str], *, key: str = "data.train") -> list[list[Path]]:
    """The files of each source that `train` names, in a fixed order (folders and globs sorted), each once.

    A source is a file, a folder (searched through; hidden files, README and LICENSE left out), a glob, or a
    name on the Hugging Face hub; several are a list, or separated by commas. What has a data file's suffix
    or begins with `.`, `/` or `~` is a path; `organisation/name` that does not exist here is a hub name.

    Raises Refused (all problems at once) where there is nothing, or nothing that soup reads.
    """
    sources: list[list[Path]] = []
    problems: list[Problem] = []
    for name in source_names(train):
        try:
            sources.append(_one(name, key))
        except Refused as refused:
            problems += refused.problems
    # One file by two names (a.jsonl, ./a.jsonl, a link) is the same rows twice.
    files = [file.resolve() for source in sources for file in source]
    for file in sorted({file for file in files if files.count(file) > 1}):
        problems.append(Problem(key=key, value=str(file), why="is named twice", fix="name each file once"))
    if problems:
        raise Refused(problems)
    return sources


def _one(name: str, key: str) -> list[Path]:
    def refused(why: str, fix: str) -> Refused:
        return Refused(Problem(key=key, value=name, why=why, fix=fix))

    if not name.strip():
        raise refused("is empty", "name a file, a folder, a glob or a hub data set")
    if "\0" in name:
        raise refused("is not a path", "name a file, a folder, a glob or a hub data set")
    path = Path(name).expanduser()
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # a name longer than the file system allows
        raise refused(f"cannot be looked up: {error.strerror}", "name a file that exists") from error
    if is_folder:
        found = [
            file for file in sorted(path.rglob("*")) if _is_data(file.relative_to(path)) and file.is_file()
        ]
        if not found:
            raise refused(
                "the folder holds no data file", f"put files of these kinds there: {', '.join(SUFFIXES)}"
            )
        return found
    if is_file:
        if not path.name.lower().endswith(SUFFIXES):
            raise refused(
                f"files of this kind ({path.suffix or 'no suffix'}) are not read",
                f"convert it to one of {', '.join(SUFFIXES)}",
            )
        return [path]
    if glob.has_magic(name):
        found = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
        found = [file for file in found if _is_data(Path(file.name)) and file.is_file()]
        if not found:
            raise refused("the glob matches no data file", "check it with ls, and quote it from the shell")
        return found
    if _HUB_NAME.fullmatch(name) and not name.lower().endswith(SUFFIXES):
        return _download(name, key)
    raise refused(
        "there is no such file or folder", "check the path; a relative one starts at the current folder"
    )


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    about = path.stem.upper() in ("README", "LICENSE", "DATASET_INFO")
    return path.name.lower().endswith(SUFFIXES) and not hidden and not about


def _download(name: str, key: str) -> list[Path]:
    """The data files of a hub data set; those of the wanted split where files are named after splits."""
    import huggingface_hub

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name, repo_type="dataset", allow_patterns=[f"*{suffix}" for suffix in SUFFIXES]
            )
        )
    except Exception as error:  # httpx, huggingface_hub and OS errors have no common class below Exception
        raise Refused(
            Problem(
                key=key,
                value=name,
                why="is no file or folder here, and the Hugging Face hub did not give it: "
                + str(error).strip().split("\n")[0],
                fix="check the name and the network, or download the data set and name its folder",
            )
        ) from error
    files = [
        file for file in sorted(folder.rglob("*")) if _is_data(file.relative_to(folder)) and file.is_file()
    ]
    if not files:
        raise Refused(
            Problem(
                key=key,
                value=name,
                why="the hub data set has no file that soup reads",
                fix=f"convert it to one of {', '.join(SUFFIXES)}",
            )
        )
    return [file for file in files if _SPLIT[key].search(str(file.relative_to(folder)))] or files
