"""The cache folder: what can be made again (converted models, tokenised data), shared by all runs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def root() -> Path:
    """`SOUP_CACHE`, or `soup` in the user's cache directory."""
    given = os.environ.get("SOUP_CACHE")
    if given:
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "soup"


@contextmanager
def entry(folder: Path) -> Iterator[Path | None]:
    """Makes a cache folder once, whoever comes first.

    Yields a temporary folder to fill, which becomes `folder` when the block ends well, or `None` when
    `folder` is complete already. Writers wait for each other; one that dies leaves nothing that counts.
    """
    from filelock import FileLock

    if folder.is_dir():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            yield None
            return
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield partial
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
