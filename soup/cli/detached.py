"""`python -m soup.cli.detached SWEEP_FOLDER [RUN...]`: runs a sweep of launch=local where no terminal is needed."""

from __future__ import annotations

import sys
from pathlib import Path

from soup.cli.loader import launcher
from soup.cli.multirun import results
from soup.sweep import Sweep


def main(words: list[str]) -> int:
    """Runs what is not finished, of the runs named or of all, and says what it came to."""
    sweep = Sweep(Path(words[0]))

    def say(text: str) -> None:
        print(text, flush=True)

    status = launcher("local").work(sweep, say, words[1:] or None)
    ended = results(sweep, say)
    return status or ended


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
