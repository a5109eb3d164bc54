"""`soup cancel | retry [SWEEP]`, and what all commands about a sweep on disk share."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from soup import sweep as sweeps
from soup.cli.loader import launcher
from soup.cli.multirun import results
from soup.errors import Problem, Refused
from soup.sweep import Sweep


def named(words: list[str], args: Namespace) -> Sweep:
    """The sweep that the command line names, the latest where it names none."""
    if len(words) > 1:
        why = "one sweep at a time"
        raise Refused(
            Problem(key=args.command, value=" ".join(words), why=why, fix=f"{args.command} {words[0]}")
        )
    return sweeps.find(Path(args.run_root).absolute(), *words)


def cancel(words: list[str], args: Namespace) -> int:
    """Asks what runs the sweep to stop; returns 0 where it has."""
    sweep = named(words, args)
    return launcher(sweep.record()["launch"]).cancel(sweep, say)


def retry(words: list[str], args: Namespace) -> int:
    """Runs what is not finished, failed points too, as the sweep was last given; returns the exit status."""
    sweep = named(words, args)
    record, states = sweep.record(), sweep.states()
    left = [run for run, state in states.items() if state not in sweep.done]
    if not left:
        say(f"all {len(states)} points of sweep {sweep.id} are finished")
        return 0
    say(f"sweep {sweep.id}: {len(left)} of {len(states)} points to run")
    status = launcher(record["launch"]).start(sweep, say, left)
    if not record["settings"]["wait"]:
        say(f"`soup status {sweep.id}` shows how it goes; also: logs, cancel")
        return status
    ended = results(sweep, say)
    return status or ended


def say(text: str) -> None:
    print(text, flush=True)
