"""What every command does with composed points before anything else: schema, rules, packages, inputs, plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from itertools import chain
from pathlib import Path
from typing import Any

from soup import cache, inputs, rewards, rules
from soup.cli.compose import Point
from soup.data.report import Report
from soup.device import Device, gpus, resolve
from soup.errors import Problem, Refused
from soup.model import attention, source
from soup.model.names import untargeted
from soup.plan import Lengths, Plan, plan
from soup.rope import scorers_fit
from soup.schema import Config, check, merge_arguments

MARGIN = 1.25  # by how much a plan of memory may be too high: bench/plan_accuracy.py, and what processes have in common


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A point that can work. `model_folder`: the model's, or for a plan that of what stands in for its tokenizer.

    `content`: hashes of what it reads, which are part of its run's id; none where a plan goes without some of it.
    """

    point: Point
    config: Config
    device: Device
    model_folder: Path
    reports: Mapping[str, Report]
    plan: Plan
    content: Mapping[str, str]


class Shared:
    """What is read once for all points of a command that read the same: reports of their data, hashes."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Any] = {}

    def once(self, what: str, of: Any, read: Callable[[], Any]) -> Any:
        """`read()` for the first point whose `of` has this representation, its answer for the others."""
        key = (what, repr(of))
        if key not in self._found:
            self._found[key] = read()
        return self._found[key]


def checked(points: Sequence[Point], *, train: bool) -> list[Checked | Refused]:
    """Each point checked, or the refusal that holds every problem found with it.

    `train`: the point is to be built here and now, so what it needs must be installed and built,
    and its data is tokenised into the cache; without, lengths are measured and nothing is written.
    """
    found: list[Checked | Refused] = []
    shared = Shared()
    for point in points:
        try:
            found.append(_checked(point, shared, train=train))
        except Refused as refused:
            found.append(refused)
    return found


def valid(points: Sequence[Point], *, train: bool) -> list[Checked]:
    """All points, or one refusal with the problems of every invalid one; `launch.invalid=skip` leaves those out."""
    return admitted(points, checked(points, train=train))


def admitted(points: Sequence[Point], found: Sequence[Checked | Refused]) -> list[Checked]:
    """The same, of points that have been checked."""
    bad = [(point, one) for point, one in zip(points, found, strict=True) if isinstance(one, Refused)]
    good = [one for one in found if isinstance(one, Checked)]
    skip = good and all(one.config.launch.invalid == "skip" for one in good)
    if bad and not skip:
        if len(points) == 1:
            raise bad[0][1]
        problems = dict.fromkeys(problem for _, refused in bad for problem in refused.problems)
        advice = Problem(
            key="launch.invalid",
            why=f"{len(bad)} of {len(points)} points are invalid, for the reasons above",
            fix="change the sweep, or launch.invalid=skip to leave them out",
        )
        raise Refused([*problems, advice])
    return good


def _checked(point: Point, shared: Shared, *, train: bool) -> Checked:
    config = check(point.tree)
    device = resolve(config.launch.device)
    facts = rules.facts(config, device=device.kind, model_config=None)
    if problems := rules.broken(facts):
        raise Refused(problems)
    if train and (problems := _here(config, device)):
        raise Refused(problems)
    merge_arguments(config)
    rewards.load(config.task.rewards)
    model = shared.once("model", config.model, lambda: source.described(config.model, weights=train))
    facts = rules.facts(config, device=device.kind, model_config=model.config)
    if problems := rules.broken(facts):
        raise Refused(problems)
    if not model.notes and (problem := untargeted(config, model.folder, model.config)):
        raise Refused(problem)
    data = inputs.data_arguments(config, model.folder)
    if not data["eval_fraction"]:
        data["split_seed"] = None  # nothing is split by it
    reports = shared.once(
        "reports", (data, config.task.rewards), lambda: _reports(config, model.folder, train)
    )
    names = (data, config.model, config.task.files)
    elsewhere = "model" in model.notes or not train and not all(map(_is_here, config.task.files))
    content = {} if elsewhere else shared.once("content", names, lambda: inputs.content(config, model.folder))
    if config.longctx.rope_scaling_type != "none":
        scorers_fit(config)
    planned = plan(config, model=model.config, device=device, lengths=_lengths(reports))
    if train and (problem := _too_large(config, device, planned)):
        raise Refused(problem)
    return Checked(
        point=point,
        config=config,
        device=device,
        model_folder=model.folder,
        reports=reports,
        plan=replace(planned, notes=planned.notes | model.notes),
        content=content,
    )


def _is_here(file: str) -> bool:
    return Path(file).expanduser().exists()


def _here(config: Config, device: Device) -> list[Problem]:
    """What keeps a run from training on this machine now."""
    problems = []
    if device.kind == "cuda" and config.launch.slurm is None and resolve("auto").kind != "cuda":
        problems.append(
            Problem(
                key="launch.device",
                value=config.launch.device,
                why="this machine has no GPU",
                fix="launch.device=auto; `soup plan` works for a device that is elsewhere",
            )
        )
    elif device.kind == "cuda" and config.launch.slurm is None and config.distributed.processes > len(gpus()):
        problems.append(
            Problem(
                key="distributed.processes",
                value=config.distributed.processes,
                why=f"each process trains on a GPU of its own, and this machine has {len(gpus())}",
                fix=f"distributed.processes={len(gpus())}, or launch=slurm",
            )
        )
    asked = config.training.use_flash_attn
    here = device.kind == "cuda" and config.launch.slurm is None and asked in attention.FLASH
    if here and (why := attention.missing(asked)) is not None:
        problems.append(
            Problem(
                key=attention.KEY,
                value=asked,
                why=why,
                fix=f"pip install {attention.FLASH[asked].distribution}, or {attention.KEY}=auto",
            )
        )
    for package in dict.fromkeys(package for spec in config.specs() for package in spec.requires):
        try:
            distribution(package.distribution)
        except PackageNotFoundError:
            problems.append(
                Problem(
                    key="environment",
                    why=f"this configuration needs {package.distribution}, which is not installed",
                    fix=f"pip install 'soup-launcher[{package.extra}]'",
                )
            )
    return problems


def _too_large(config: Config, device: Device, planned: Plan) -> Problem | None:
    """A run of which this machine's memory, swap included, cannot hold the processes. What a GPU has is not known."""
    import psutil

    processes, each = config.distributed.processes, planned.peak_memory_bytes
    there = device.memory_bytes + psutil.swap_memory().total
    if device.kind != "cpu" or config.launch.slurm is not None or processes * each <= MARGIN * there:
        return None
    why = f"its peak is predicted to be {each / 2**30:.1f} GiB"
    why += f" in each of {processes} processes" if processes > 1 else ""
    fewer = int(there // each)
    several = 1 < fewer < processes
    return Problem(
        key="distributed.processes" if several else "training.batch_size",
        value=processes if several else config.training.batch_size,
        why=f"{why}, and this machine has {there / 2**30:.1f} GiB of memory",
        fix=f"distributed.processes={fewer}"
        if several
        else "a smaller one with more training.gradient_accumulation_steps, a shorter data.max_length, or "
        "training.gradient_checkpointing=true; `soup plan` shows what needs how much",
    )


def _reports(config: Config, model_folder: Path, train: bool) -> dict[str, Report]:
    """The data's reports; those that were only measured are kept in the cache, for the next plan."""
    from soup.data import arrow, prepare

    arguments = inputs.data_arguments(config, model_folder)
    if train:
        prepared = prepare.prepare(**arguments)
        lacking = {
            column: reward
            for column, reward in rewards.columns(config.task.rewards).items()
            if any(column not in one.columns for one in prepared.values())
        }
        if lacking:
            raise Refused(
                Problem(
                    key=rewards.KEY,
                    value=reward,
                    why=f"compares with the column `{column}`, which the data do not have",
                    fix=f"data with {column}, or another reward; columns: {', '.join(prepared['train'].columns)}",
                )
                for column, reward in lacking.items()
            )
        files = [one.open() for one in prepared.values()]
        if problems := rewards.unanswered(
            config.task.rewards, lambda name: chain.from_iterable(arrow.column(file, name) for file in files)
        ):
            raise Refused(problems)
        return {split: one.report for split, one in prepared.items()}
    measured = cache.root() / "lengths" / prepare.fingerprint(**arguments)
    with cache.entry(measured) as partial:
        if partial is not None:
            found = {split: one.to_dict() for split, one in prepare.lengths(**arguments).items()}
            (partial / "report.json").write_text(json.dumps(found))
    saved = json.loads((measured / "report.json").read_text())
    return {split: Report.from_dict(one) for split, one in saved.items()}


def _lengths(reports: Mapping[str, Report]) -> Lengths:
    train: dict[str, Any] = reports["train"].lengths
    return Lengths(
        rows=reports["train"].rows,
        mean=train["mean"],
        p50=train["p50"],
        p95=train["p95"],
        max=train["max"],
        tokens=train["sum"],
        learnt=train["sum_labels"],
        sampled=reports["train"].sampled,
        eval_rows=reports["eval"].rows if "eval" in reports else 0,
        sample=tuple(train["sample"]),
        common=train["common"],
        shared=train["shared"],
    )
