"""`soup runs [show|compare|resume|export|push] [ID...]`: what has been trained, and what can be done with it."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soup.errors import Problem, Refused
from soup.record import Run, find, read_json

METRICS = ("step", "loss", "reward", "eval_loss", "tokens", "tokens_per_s", "peak_memory_bytes")


def runs(words: list[str], args: Namespace) -> int:
    """Dispatches on the first word; without one, lists all runs."""
    root = Path(args.run_root)
    if words[:1] == ["push"]:  # whose second word is no run
        from soup.cli.push import push

        return push(words[1:], args)
    verbs = {"show": show, "compare": compare, "resume": resume, "export": export}
    if not words:
        return list_runs(root)
    if words[0] not in verbs:
        raise Refused(
            Problem(
                key="runs", value=words[0], why="is no such action", fix=f"one of: {', '.join(verbs)}, push"
            )
        )
    return verbs[words[0]](find(root, words[1:] or ["latest"]), args)


def list_runs(root: Path) -> int:
    """All runs below `root`, oldest first."""
    found = find(root, [])
    console = _console()
    if not found:
        console.print(f"no runs in {root}")
    else:
        console.print(table(found))
    return 0


def table(found: Sequence[Run], points: Sequence[str] | None = None) -> Any:
    """A rich table: id, name, state, step, losses, and the first error line of what did not finish.

    `points`: overrides to show instead of names, one for each run.
    """
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for name in (
        "id",
        "name" if points is None else "point",
        "task",
        "state",
        "step",
        "loss",
        "eval_loss",
        "",
    ):
        shown.add_column(name, overflow="fold")
    for number, run in enumerate(found):
        tree, last, state = run.tree(), _last(run), run.state()
        error = str((run.result() or {}).get("error", "")).splitlines()[:1] if state != "finished" else []
        shown.add_row(
            run.id,
            (tree["run"]["name"] or "") if points is None else points[number],
            tree["task"]["name"],
            state,
            *(_number(last.get(key)) for key in ("step", "loss", "eval_loss")),
            error[0] if error else "",
        )
    return shown


def show(chosen: Sequence[Run], args: Namespace) -> int:
    """Configuration, plan against measurement, effective settings and result of each run."""
    from soup.cli.prove import show as show_effects

    console = _console()
    for run in chosen:
        result, plan, proved = run.result() or {}, read_json(run.plan) or {}, read_json(run.effective)
        if args.json:
            told = {"id": run.id, "state": run.state(), "config": run.tree(), "plan": plan, "result": result}
            print(json.dumps(told | {"effective": proved}, indent=2))
            continue
        console.print(f"run {run.id}: {run.state()}", style="bold")
        console.print(f"folder {run.folder}")
        for key, value in result.items():
            if key != "traceback":
                console.print(f"  {key}: {_number(value)}", markup=False)
        planned, measured = plan.get("peak_memory_bytes"), result.get("peak_memory_bytes")
        if planned and measured:
            ratio = measured / planned
            console.print(f"  memory: planned {planned / 2**30:.2f} GiB, measured {ratio:.0%} of it")
        console.print(run.config.read_text(encoding="utf-8").rstrip(), markup=False)
        if proved:
            show_effects(proved, console)
    return 0


def compare(chosen: Sequence[Run], args: Namespace) -> int:  # noqa: ARG001
    """The keys in which runs differ, and their final metrics, side by side."""
    from rich.table import Table

    if len(chosen) < 2:
        raise Refused(Problem(key="runs compare", why="needs two runs or more", fix="runs compare ID ID"))
    shown = Table(box=None, pad_edge=False)
    shown.add_column("key")
    for run in chosen:
        shown.add_column(run.id, overflow="fold")
    flat = [dict(_flat(run.tree())) for run in chosen]
    for key in dict.fromkeys(key for one in flat for key in one):
        values = [one.get(key, "-") for one in flat]
        if any(value != values[0] for value in values):
            shown.add_row(key, *map(str, values))
    shown.add_section()
    last = [_last(run) for run in chosen]
    for key in ("state", *METRICS):
        values = [
            run.state() if key == "state" else _number(one.get(key))
            for run, one in zip(chosen, last, strict=True)
        ]
        shown.add_row(key, *values)
    _console().print(shown)
    return 0


def resume(chosen: Sequence[Run], args: Namespace) -> int:  # noqa: ARG001
    """Continues runs that have not finished, from their own folders."""
    from soup.cli.process import train

    console = _console()
    status = 0
    for run in chosen:
        if run.state() == "finished":
            console.print(f"run {run.id} is finished")
            continue
        console.print(f"continuing run {run.id} in {run.folder}")
        status = max(status, abs(train(run)))
        console.print(f"run {run.id}: {run.state()}")
    return status


def export(chosen: Sequence[Run], args: Namespace) -> int:
    """Writes a folder that plain transformers loads: the adapter folded into its base (--merged), or that, in the
    integers that the run was trained for (--quantized)."""
    from soup.cli.process import child

    console = _console()
    if args.merged == args.quantized:
        raise Refused(
            Problem(
                key="runs export",
                why="exports the base with the adapter folded in, plain or quantized",
                fix="runs export --merged ID, or --quantized; the adapter itself lies in the run's model/",
            )
        )
    kind = "merged" if args.merged else "quantized"
    for run in chosen:
        words = _merges(run) if args.merged else _quantizes(run)
        target = run.folder / kind
        if not target.is_dir():
            log = run.folder / "export.txt"
            with log.open("wb") as file:
                done = child(["-m", *words, str(run.model), str(target)], log=file)
            if done != 0:
                console.print(f"the export of {run.id} failed; {log} says why", style="red")
                return 1
        console.print(f"{kind} model: {target}")
    return 0


def _merges(run: Run) -> list[str]:
    """The program that folds the run's adapter in."""
    if not (run.model / "adapter_config.json").is_file():
        why = "has no adapter to fold in" if run.model.is_dir() else "has no model yet"
        raise Refused(Problem(key="run", value=run.id, why=why, fix=f"see {run.folder}"))
    return ["soup.model.merge"]


def _quantizes(run: Run) -> list[str]:
    """The program that quantizes the run's model as it was trained to be."""
    spec = run.tree()["model"]
    if not run.model.is_dir():
        raise Refused(Problem(key="run", value=run.id, why="has no model yet", fix=f"see {run.folder}"))
    if not spec["quantization_aware"]:
        why = "was not trained to be quantized"
        fix = "train with model.quantization=4bit model.quantization_aware=true, or export --merged"
        raise Refused(Problem(key="run", value=run.id, why=why, fix=fix))
    return ["soup.model.quantize", spec["quantization"], str(spec["quantization_group_size"])]


def _last(run: Run) -> dict[str, Any]:
    last: dict[str, Any] = {}
    for line in run.lines():
        last |= line
    return last


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found.extend(_flat(value, f"{prefix}{key}."))
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False)
