"""`soup [overrides]`: checks, places, trains. What is finished is skipped, what was interrupted goes on."""

from __future__ import annotations

import signal
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soup.cli import hints
from soup.cli.check import Checked, admitted, checked
from soup.cli.compose import Point
from soup.cli.multirun import FAILED, multirun
from soup.cli.process import threads, train
from soup.cli.table import summary
from soup.device import slots
from soup.errors import Problem, Refused
from soup.record import Run, environment, place, run_id, write_json


def run(points: Sequence[Point], args: Namespace) -> int:
    """Trains every point; returns the exit status."""
    from rich.console import Console

    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    found = checked(points, train=True)
    if hint := hints.unsloth([one for one in found if isinstance(one, Checked)]):
        Console(stderr=True, highlight=False).print(hint, soft_wrap=True)
    if args.study is not None:
        from soup.cli.study import search

        return search(args.study, points, found, args, settle, say)
    if len(points) > 1 or args.multirun or not _here(found[0]):
        return multirun(points, found, args, settle, say)
    (one,) = admitted(points, found)
    return _one(settle(one), one, console)


def _here(one: Checked | Refused) -> bool:
    """Whether a single run is to train in front of who asks for it."""
    return isinstance(one, Refused) or (one.config.launch.slurm is None and one.config.launch.wait)


def settle(one: Checked) -> Run:
    """The point's run folder, with everything that the training process reads."""
    run_config = one.config.run
    where = place(
        Path(run_config.root), run_id(one.config.tree, one.content), one.config.tree, resume=run_config.resume
    )
    _same_processes(where, one)
    if where.state() == "new":
        write_json(where.folder / "inputs.json", dict(one.content))
        write_json(where.plan, one.plan.to_dict())
    return where


def _same_processes(where: Run, one: Checked) -> None:
    """Refuses a run that is there already, for another number of processes."""
    there, asked = where.tree()["distributed"], one.config.tree["distributed"]
    for name in ("processes", "nodes"):
        if there[name] != asked[name]:
            key = f"distributed.{name}"
            why = f"run {where.id} was made for {there[name]}: its batches, and the shares in its checkpoints, are of "
            why += "that number"
            fix = f"{key}={there[name]} to go on with it, or run.resume=never for a new run"
            raise Refused(Problem(key=key, value=asked[name], why=why, fix=fix))


def _one(where: Run, one: Checked, console: Any) -> int:
    state = where.state()
    if state == "finished":
        console.print(f"run {where.id} is finished: {summary(where)}")
        console.print(f"it lies in {where.folder}; run.resume=never trains it again in a new folder")
        return 0
    verb = {
        "new": "training",
        "running": "waiting for the process that runs",
        "interrupted": "continuing",
        "pruned": "continuing what a sweep has stopped:",
    }.get(state, f"{state} before, trying again:")
    console.print(f"{verb} run {where.id} in {where.folder}")
    report = one.reports["train"]
    learnt = report.lengths["sum_labels"]
    if report.sampled:  # of what trains here only a stream is
        console.print("rows are read while training; of the first ones:")
    if len(report.sources) > 1:
        form = "{rows} rows of {name}" if report.sampled else "{rows} of {read} rows of {name}"
        console.print(", ".join(form.format(**source) for source in report.sources), soft_wrap=True)
    console.print(
        f"{report.rows} rows ({report.format}), {report.lengths['sum']} tokens"
        + (f", {learnt} of them learnt" if learnt else "")
        + f"; {report.truncated} truncated, {report.dropped_nothing_left + report.skipped} too long and left out, "
        f"{report.bad_total} bad and skipped",
        soft_wrap=True,
    )
    planned = one.plan.to_dict()
    console.print(
        f"{planned['steps']} steps; predicted peak memory {planned['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
    if not where.environment.is_file():
        write_json(
            where.environment,
            environment() | {"threads": threads(slots(one.config.launch.slots, one.device))},
        )
    status = train(where)
    died = f"its process died of {signal.Signals(-status).name}; " if status < 0 else ""
    state = where.state()
    if state == "finished":
        console.print(f"finished: {summary(where)}")
        console.print(f"the model is in {where.model}")
    elif state == "interrupted":
        console.print(f"interrupted; {died}the same command continues it ({where.folder})")
    elif state == "diverged":
        console.print(f"diverged: {(where.result() or {}).get('error')}")
    elif died:
        console.print(f"{died}the same command continues the run")
    return FAILED if died else status
