"""`soup import FILE [--from TOOL] [--out FILE] [--task T] [--deepspeed X] [--fsdp X]`: another tool's file as ours."""

from __future__ import annotations

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from soup import rules
from soup.cli.compose import Point, drive
from soup.cli.loader import conf_dir
from soup.device import resolve
from soup.errors import Problem, Refused
from soup.importers.files import read, render, whose
from soup.importers.mapping import COUNT, Tool, Translated, settle, translate
from soup.importers.trl import TASK, TASKS
from soup.schema import check

DEEPSPEED = {"zero2": "zero2", "zero3": "zero3", "zero2_offload": "zero2_offload"}
FSDP = {"full_shard": "fsdp_full_shard", "shard_grad": "fsdp_shard_grad", "full_offload": "fsdp_full_offload"}


def import_(words: list[str], args: Namespace) -> int:
    """Writes the experiment, and says of every key of the file what became of it."""
    if len(words) != 1:
        fix = "soup import soup.yaml"
        raise Refused(Problem(key="import", value=" ".join(words) or None, why="takes one file", fix=fix))
    path = Path(words[0])
    file = read(path)
    tool = whose(path, file, args.from_tool)
    file = _with_task(path, file, tool, args.task)
    found = translate(tool, file)
    found.left.pop(TASK if tool.needs_task else "", None)
    _shard(found, args)
    settle(found)
    target = _target(path, args.out)
    point, config, notes = _composed(found, tool, path)
    text = render(found, tool, path.name, notes)
    _write(target, text)
    if args.json:
        told = {
            "out": str(target),
            "tool": tool.name,
            "choices": {k: v for k, (v, _) in found.chosen.items()},
        }
        told |= {"keys": {key: value for key, (value, _) in found.put.items()}}
        told |= {"from": {key: source for key, (_, source) in (found.put | found.chosen).items()}}
        print(
            json.dumps(
                told | {"same": found.same, "without_counterpart": found.left, "notes": notes}, indent=2
            )
        )
        return 0
    _tell(found, tool, target, notes)
    return 0


def _with_task(path: Path, file: dict[str, Any], tool: Tool, task: str | None) -> dict[str, Any]:
    """TRL's files do not say which trainer they are for: that is on its command line."""
    if not tool.needs_task:
        if task is not None:
            why = f"{tool.name}'s file says itself what it trains"
            raise Refused(Problem(key="--task", value=task, why=why, fix="drop it"))
        return file
    if task is None:
        why = "TRL's command line says which task it is for (trl sft --config ...), and this file does not"
        raise Refused(
            Problem(key="import", value=str(path), why=why, fix=f"--task {', --task '.join(TASKS)}")
        )
    return {**file, TASK: task}


def _shard(found: Translated, args: Namespace) -> None:
    if args.deepspeed and args.fsdp:
        raise Refused(Problem(key="--deepspeed --fsdp", why="exclude each other", fix="give one of them"))
    for flag, value, known in (("--deepspeed", args.deepspeed, DEEPSPEED), ("--fsdp", args.fsdp, FSDP)):
        if value:
            found.chosen["distributed"] = (known[value], f"{flag} {value}")
            for key in ("deepspeed", "fsdp", "fsdp_config"):
                if key in found.left:
                    found.same[key] = f"{flag} says it"
                    del found.left[key]


def _target(path: Path, out: str | None) -> Path:
    if out is not None:
        target = Path(out)
        if target.suffix not in (".yaml", ".yml"):
            raise Refused(Problem(key="--out", value=out, why="is no YAML file", fix=f"--out {out}.yaml"))
    else:
        name = re.sub(r"[^\w-]+", "_", path.stem).strip("_").lower() or "imported"
        target = Path("conf") / "experiment" / f"{name}.yaml"
    own = conf_dir() / "experiment" / target.name
    if own.is_file() and own.resolve() != target.resolve():
        why = f"soup has an experiment {target.stem} of its own"
        fix = f"--out {target.with_name(f'my_{target.name}')}"
        raise Refused(Problem(key="--out", value=str(target), why=why, fix=fix))
    return target


def _composed(found: Translated, tool: Tool, path: Path) -> tuple[Point, Any, list[str]]:
    """The experiment as the command line composes it; what the schema refuses of it is left, with its reason."""
    from soup.cli.main import parse

    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "experiment"
        folder.mkdir()
        while True:
            (folder / "imported_here.yaml").write_text(render(found, tool, path.name, []), encoding="utf-8")
            args = parse(["--config-dir", scratch, "+experiment=imported_here"])
            point: Point = drive(args, lambda points: points[0])
            try:
                config = check(point.tree)
                break
            except Refused as refused:
                ours = [one for one in refused.problems if one.key in found.put]
                if not ours:
                    raise
                for problem in ours:
                    value, key = found.put.pop(problem.key)
                    why = f"{problem.key}={value}: {problem.why}"
                    if not key.endswith("default"):
                        found.left[key] = why
    notes = []
    if config.model.embedded:
        notes.append(
            f"no model is named in this file ({tool.model}), and soup would take its embedded one: "
            "model=hub model.base=NAME"
        )
    if config.data.train is None:
        notes.append("no rows are named in this file, and soup would take its embedded set: data.train=FILE")
    if config.distributed.world > 1:
        notes.append(COUNT)
    facts = rules.facts(config, device=resolve(config.launch.device).kind, model_config=None)
    notes += [f"refused as it is: {one}".replace("\n    fix:", "; fix:") for one in rules.broken(facts)]
    return point, config, notes


def _write(target: Path, text: str) -> None:
    if target.is_file() and target.read_text(encoding="utf-8") != text:
        why = "is there already, and says something else"
        raise Refused(
            Problem(key="--out", value=str(target), why=why, fix="--out ANOTHER.yaml, or remove it")
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        why = f"cannot be written: {error.strerror}"
        raise Refused(Problem(key="--out", value=str(target), why=why, fix="--out FILE.yaml")) from error


def _tell(found: Translated, tool: Tool, target: Path, notes: list[str]) -> None:
    width = shutil.get_terminal_size().columns
    told = len(found.put) + len(found.chosen)
    print(f"{target}: {told} settings from {tool.name}'s file and defaults")
    for title, lines in (("without counterpart in soup", found.left), ("what soup does anyway", found.same)):
        if lines:
            print(f"\n{title}")
            for key, why in lines.items():
                print(f"  {key}: {why}"[: max(width, 80) * 3])
    for note in notes:
        print(f"\n{note}")
    folder = target.parent.parent if target.parent.name == "experiment" else None
    if folder is None:
        command = (
            "move it into a folder experiment/ of a folder CONF: soup plan --config-dir CONF +experiment=NAME"
        )
    elif folder.resolve() == conf_dir().resolve():
        command = f"soup plan experiment={target.stem}"
    else:
        command = f"soup plan --config-dir {folder} +experiment={target.stem}"
    print(f"\nnext: {command}")
