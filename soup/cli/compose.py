"""From a command line to resolved points: one for a run, all of them for a sweep."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from soup.cli.loader import hydra
from soup.cli.search import Search, taken
from soup.errors import Problem, Refused

# What soup reads of Hydra's own settings; the process that trains never sees Hydra.
HYDRA_KEYS = (
    "hydra.sweeper",
    "hydra/sweeper",
    "hydra/sweeper/sampler",
    "hydra/launcher",
    "hydra.searchpath",
    "hydra.mode",
)


@dataclass(frozen=True)
class Point:
    """One resolved configuration.

    `tree` is plain data without Hydra's node, `choices` what each group was set to (`{"task": "dpo"}`; a
    list where a group has several), and `overrides` the words of the command line that lead to it.
    """

    tree: dict[str, Any]
    choices: dict[str, str | list[str]]
    overrides: tuple[str, ...]


def differing(points: Sequence[Point]) -> list[str]:
    """What tells each point of a sweep from the others: its overrides that not all of them have."""
    shared = set.intersection(*(set(one.overrides) for one in points))
    return [" ".join(word for word in one.overrides if word not in shared) for one in points]


Action = Callable[[Sequence[Point]], Any]


def drive(args: Namespace, action: Action) -> Any:
    """Composes what `args` asks for, calls `action` once with all points, and returns what it returned.

    A sweeper that proposes points in batches has one call per batch, and the worst status is returned.

    Raises:
        Refused: with every problem found, before `action` is called.
    """
    args.study = None
    search, args.pruner, args.overrides = taken(args.overrides, multirun=args.multirun)
    with hydra(args) as engine:
        if not args.multirun:
            cfg = engine.compose_config(args.config_name, args.overrides, RunMode.RUN)
            _refuse_unread(cfg)
            _launcher(cfg, args)
            if cfg.hydra.mode != RunMode.MULTIRUN:
                return action((point(cfg),))
        return _sweep(engine, args, action, search)


def point(cfg: DictConfig) -> Point:
    """Resolves a composed configuration.

    Raises:
        Refused: keys without a value, or interpolations that lead nowhere; all of them.
    """
    if "job" in cfg.hydra:  # for ${hydra:...}, which a point that came without it does not read
        HydraConfig.instance().set_config(cfg)
    problems = [problem for key in cfg if key != "hydra" for problem in unresolved(cfg, key, str(key))]
    if problems:
        raise Refused(problems)
    tree = {}
    for key in cfg:
        if key != "hydra":
            value = cfg[key]
            tree[key] = OmegaConf.to_container(value, resolve=True) if isinstance(value, Container) else value
    choices = {
        group: OmegaConf.to_container(choice) if isinstance(choice, Container) else choice
        for group, choice in cfg.hydra.runtime.choices.items()
        if choice is not None and not group.startswith("hydra/")
    }
    return Point(tree=tree, choices=choices, overrides=tuple(_words(cfg)))


def _words(cfg: DictConfig) -> list[str]:
    """The overrides as they were given: read one by one, `a=${b}` would hold the value that b has here."""
    return OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False)  # type: ignore[return-value]


def unresolved(parent: Container, key: Any, path: str) -> Iterator[Problem]:
    """Every key at or below `parent[key]` that is missing, or whose interpolation leads nowhere."""
    try:
        if OmegaConf.is_missing(parent, key):
            yield Problem(key=path, value="???", why="has no value, and needs one", fix=f"give {path}=...")
            return
        value = parent[key]
    except OmegaConfBaseException as error:
        text = OmegaConf.to_container(parent, resolve=False)[key]
        why = str(error).partition("\n")[0]
        fix = f"correct the interpolation, or give {path} a value"
        yield Problem(key=path, value=str(text), why=why, fix=fix)
        return
    if isinstance(value, DictConfig):
        for name in value:
            yield from unresolved(value, name, f"{path}.{name}")
    elif isinstance(value, ListConfig):
        for index in range(len(value)):
            yield from unresolved(value, index, f"{path}.{index}")


def _refuse_unread(cfg: DictConfig) -> None:
    """Hydra's settings that nothing would read are refused like any other."""
    problems = []
    for line in cfg.hydra.overrides.hydra:
        key, _, value = line.lstrip("+~").partition("=")
        if line.startswith("~") or not any(key == one or key.startswith(f"{one}.") for one in HYDRA_KEYS):
            fix = f"drop it (soup reads {', '.join(HYDRA_KEYS)}; runs lie under run.root)"
            why = "soup does not read this setting"
            problems.append(Problem(key=line.partition("=")[0], value=value or None, why=why, fix=fix))
    if cfg.hydra.callbacks:
        why = "soup calls no Hydra callbacks"
        problems.append(Problem(key="hydra.callbacks", why=why, fix="drop it; tracking=... follows a run"))
    if problems:
        raise Refused(problems)


def _launcher(cfg: DictConfig, args: Namespace) -> str:
    """The name of the Hydra launcher that `launch` stands for, which one given by hand must agree with."""
    name = OmegaConf.select(cfg, "launch.name") or "local"
    wanted, given = f"soup_{name}", cfg.hydra.runtime.choices.get("hydra/launcher")
    by_hand = any(line.startswith("hydra/launcher=") for line in cfg.hydra.overrides.hydra)
    if given != wanted and (by_hand or given != "basic"):
        why = f"launch={name} runs with {wanted}"
        fix = "drop it: launch alone chooses the launcher"
        raise Refused(Problem(key="hydra/launcher", value=str(given), why=why, fix=fix))
    if args.command != "run":
        return "soup_local"  # which composes all points, on whatever they are to run later
    if f"{wanted}.yaml" not in ConfigStore.instance().list("hydra/launcher"):
        fix = "launch=local runs on this machine; `soup plan` works with either"
        raise Refused(Problem(key="launch", value=name, why="its launcher is not installed", fix=fix))
    return wanted


def _sweep(engine: Hydra, args: Namespace, action: Action, search: Search) -> Any:
    cfg, task_overrides = _master(engine, args)
    _refuse_unread(cfg)
    launcher = _launcher(cfg, args)
    cfg.hydra.mode = RunMode.MULTIRUN
    cfg.hydra.launcher = ConfigStore.instance().load(f"hydra/launcher/{launcher}.yaml").node
    statuses, started = [], False

    def run(points: Sequence[Point]) -> Any:
        nonlocal started
        _refuse_mixed(points, cfg, task_overrides)
        started = True
        args.study = getattr(sweeper, "study", None)  # of hydra/sweeper=optuna
        statuses.append(action(points))
        return statuses[-1]

    with TemporaryDirectory(prefix="soup-sweep-") as scratch:
        cfg.hydra.sweep.dir = scratch  # where sweepers insist on writing; soup's record lies under run.root
        sweeper = _sweeper(engine, cfg, run)
        if search != Search():
            _search_with(sweeper, search, cfg)
        try:
            sweeper.sweep(task_overrides)
        except (HydraException, ValueError, AssertionError) as error:  # of range(1,5,0) and the like
            if started:
                raise
            why = str(error) or "the sweeper does not accept this"
            raise Refused(
                Problem(key=" ".join(task_overrides), why=why, fix="list the values: key=a,b,c")
            ) from error
    return max(statuses)


def _master(engine: Hydra, args: Namespace) -> tuple[DictConfig, list[str]]:
    """What the points of a sweep have in common, and the overrides that make the points."""
    try:
        cfg = engine.compose_config(args.config_name, args.overrides, RunMode.MULTIRUN)
        return cfg, _words(cfg)
    except Refused as refused:
        # Hydra holds all keys against the default choices here: of task=dpo,ipo task.beta=0.2 it has no beta.
        group_exists = engine.config_loader.repository.group_exists
        try:
            parsed = OverridesParser.create().parse_overrides(args.overrides)
        except HydraException:
            raise refused from None
        groups = [override for override in parsed if group_exists(override.key_or_group)]
        if not any(override.is_sweep_override() for override in groups):
            raise
        common = [one.input_line for one in parsed if one.is_hydra_override() or one in groups]
        cfg = engine.compose_config(args.config_name, common, RunMode.MULTIRUN)
        return cfg, [one.input_line for one in parsed if not one.is_hydra_override()]


def _sweeper(engine: Hydra, cfg: DictConfig, run: Callable[[Sequence[Point]], Any]) -> Any:
    context = HydraContext(config_loader=engine.config_loader, callbacks=Callbacks())
    try:
        sweeper = Plugins.instance().instantiate_sweeper(config=cfg, hydra_context=context, task_function=run)
    except (HydraException, ImportError, RuntimeError, TypeError) as error:
        choice = cfg.hydra.runtime.choices["hydra/sweeper"]
        why = str(error).strip().partition("\n")[0]
        fix = "drop it, or correct its settings"
        raise Refused(Problem(key="hydra/sweeper", value=choice, why=why, fix=fix)) from error
    # It would compose every point once more, and stop at the first that fails; the launcher reports all.
    sweeper.validate_batch_is_legal = lambda _batch: None
    return sweeper


def _search_with(sweeper: Any, search: Search, cfg: DictConfig) -> None:
    if not hasattr(
        sweeper, "split_arguments"
    ):  # Hydra's plugin scan makes a second BasicSweeper: no isinstance
        choice = cfg.hydra.runtime.choices["hydra/sweeper"]
        why = "chooses its points itself, and reads no sweep.zip and sweep.random"
        raise Refused(Problem(key="hydra/sweeper", value=choice, why=why, fix="drop one of the two"))
    sweeper.split_arguments = search.split


def _refuse_mixed(points: Sequence[Point], cfg: DictConfig, task_overrides: Sequence[str]) -> None:
    if not points:
        key, fix = " ".join(task_overrides), "give each key at least one value"
        raise Refused(Problem(key=key, why="a sweep without points", fix=fix))
    name = OmegaConf.select(cfg, "launch.name")
    for one in points:
        launch = one.tree.get("launch")
        other = launch.get("name") if isinstance(launch, dict) else launch
        if other != name:
            why = f"one sweep has one launcher, and this has {name} too"
            raise Refused(
                Problem(key="launch", value=str(other), why=why, fix="sweep each launch on its own")
            )
