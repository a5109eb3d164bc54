"""`soup logs [-f] [SWEEP] [POINT]`: what the runs of a sweep say, from files alone; `-f` while they go on."""

from __future__ import annotations

import re
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from soup import parents, slurm
from soup import sweep as sweeps
from soup.errors import Problem, Refused
from soup.record import Run
from soup.sweep import Sweep

LAST = 10  # lines of each run, where no point is named
TRACE = 30  # lines of log.txt, of a run that failed
LOOK_S = 0.3


def logs(words: list[str], args: Namespace) -> int:
    """Prints all that one point said, or the last lines of each.

    POINT: its number in `soup status`, or the beginning of its run's id.
    """
    sweep, chosen = _named(words, Path(args.run_root).absolute())
    total = len(sweep.points())
    offsets = {}
    for place, run in chosen:
        said = _read(run, 0)
        offsets[run.id] = len(said)
        text = said.decode(errors="replace").splitlines()
        _show(text if len(chosen) == 1 else text[-LAST:], place, total, alone=len(chosen) == 1)
        if len(chosen) == 1 and run.state() == "failed" and (run.folder / "log.txt").is_file():
            print(f"\nthe end of {run.folder / 'log.txt'}:")
            print("\n".join((run.folder / "log.txt").read_text(errors="replace").splitlines()[-TRACE:]))
    if not any(offsets.values()) and not args.follow:
        who = f"no run of sweep {sweep.id}" if len(chosen) > 1 else f"run {chosen[0][1].id}"
        told = "has said anything" if len(chosen) > 1 else "has said nothing"
        print(f"{who} {told} yet; `soup status {sweep.id}` says where it stands", file=sys.stderr)
    while args.follow:
        going = bool(parents.alive(sweep)) or slurm.going(sweep) or any(run.running() for _, run in chosen)
        for place, run in chosen:
            said = _read(run, offsets[run.id])
            said = said[: said.rfind(b"\n") + 1]
            offsets[run.id] += len(said)
            _show(said.decode(errors="replace").splitlines(), place, total, alone=len(chosen) == 1)
        if not going:
            break
        time.sleep(LOOK_S)
    return 0


def _named(words: list[str], root: Path) -> tuple[Sweep, list[tuple[int, Run]]]:
    """The sweep, and the runs of it that are asked for, each with its number."""
    if len(words) > 2:
        raise Refused(
            Problem(key="logs", value=" ".join(words), why="takes a sweep and a point", fix="logs SWEEP 3")
        )
    point: str | None = words[1] if len(words) == 2 else None
    word = words[0] if words else "latest"
    if len(words) == 1 and not _is_sweep(root, word):  # a point of the latest
        point, word = word, "latest"
    sweep = sweeps.find(root, word)
    runs = [(place, sweep.run(one)) for place, one in enumerate(sweep.points(), 1)]
    if point is None:
        return sweep, runs
    numbered = re.fullmatch(r"\d{1,6}", point)
    match = [one for one in runs if one[0] == int(point)] if numbered else []
    match = match or [one for one in runs if one[1].id.startswith(point)]
    if len(match) != 1:
        why = f"{len(match) or 'no'} points of sweep {sweep.id} are called so"
        raise Refused(
            Problem(key="point", value=point, why=why, fix=f"a number from 1 to {len(runs)}, or a run's id")
        )
    return sweep, match


def _is_sweep(root: Path, word: str) -> bool:
    if word == "latest":
        return True
    if word.isdigit() and len(word) <= 6:
        return False
    return any(one.id.startswith(word) for one in sweeps.every(root))


def _read(run: Run, offset: int) -> bytes:
    try:
        with run.console.open("rb") as file:
            file.seek(offset)
            return file.read()
    except FileNotFoundError:
        return b""


def _show(text: Sequence[str], place: int, total: int, *, alone: bool) -> None:
    for line in text:
        print(line if alone else f"[{place}/{total}] {line}", flush=True)
