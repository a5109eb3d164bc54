"""Hydra's configuration loader, with soup's search path and refusals in place of Hydra's exceptions."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import Container, DictConfig, OmegaConf, open_dict

from soup.errors import Problem, Refused

LAUNCHERS = "hydra_plugins.soup_launchers"  # Hydra instantiates plugins of the package hydra_plugins only


def conf_dir() -> Path:
    """Where soup's own YAML lies: `soup/conf` in an installed wheel, `conf` beside `soup` in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


class SoupLoader(ConfigLoaderImpl):
    """Composes as Hydra does, and refuses what Hydra rejects and a `name` that contradicts its choice.

    `hydra.runtime.choices` of what it composes also holds groups with several choices
    (`tracking=[wandb,tensorboard]`), as lists; Hydra leaves those out.
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self._bases: dict[tuple[Any, ...], DictConfig | None] = {}
        self._choices: dict[int, Any] = {}  # of each base

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="provider=.* is not available")
                cfg = super().load_configuration(
                    config_name, overrides, run_mode, from_shell, validate_sweep_overrides
                )
        except Exception as error:  # Hydra has ValueError, TypeError, AssertionError for users' mistakes too
            from soup.cli.explain import explain

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what Hydra warned of is in the refusal
                raise Refused(explain(self, config_name, overrides, run_mode, error)) from error
        lists = self._lists(cfg.hydra.runtime.choices)
        problems = [*self._contradictions(cfg), *_mixtures(lists)]
        if problems:
            raise Refused(problems)
        with open_dict(cfg.hydra):
            cfg.hydra.runtime.choices.update({group: list(keys) for group, keys in lists.items()})
        return cfg

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """As Hydra does, which takes 80 ms; points that choose alike are composed once, and get their values after.

        These come with that little of Hydra's own node which soup reads of a point.
        """
        try:
            values = self._values(sweep_overrides)
            chosen = [word for word in sweep_overrides if word not in values]
            if values and all(self.repository.group_exists(word.partition("=")[0]) for word in chosen):
                base = self._base(master_config, chosen)
                if base is not None:
                    cfg = copy.deepcopy(base)
                    self._apply_overrides_to_config(list(values.values()), cfg)
                    with open_dict(cfg):
                        cfg.hydra = {
                            "runtime": {"choices": self._choices[id(base)]},
                            "overrides": {"task": list(sweep_overrides)},
                        }
                    return cfg
        except (HydraException, Refused):
            pass  # the long way says what is wrong
        return super().load_sweep_config(master_config, sweep_overrides)

    def _values(self, overrides: list[str]) -> dict[str, Override]:
        """Those that change the value of a key that is there; a `name` may contradict its choice, and is not plain."""
        return {
            word: parsed
            for word, parsed in zip(
                overrides, OverridesParser.create().parse_overrides(overrides), strict=True
            )
            if parsed.type == OverrideType.CHANGE
            and not self.repository.group_exists(parsed.key_or_group)
            and parsed.key_or_group.partition(".")[0] != "hydra"
            and not parsed.key_or_group.endswith("name")
            and "${" not in word
        }

    def _base(self, master_config: DictConfig, chosen: list[str]) -> DictConfig | None:
        """What points with these choices have in common; `None` where it reads Hydra's node, which knows each point."""
        key = (id(master_config), *chosen)
        if key not in self._bases:
            base = super().load_sweep_config(master_config, chosen)
            own = OmegaConf.masked_copy(base, [name for name in base if name != "hydra"])
            OmegaConf.set_struct(own, True)  # which the copy has lost: a key that is not there is refused
            self._bases[key] = None if "${hydra:" in OmegaConf.to_yaml(own) else own
            self._choices[id(own)] = OmegaConf.to_container(base.hydra.runtime.choices)
        return self._bases[key]

    def _compose_config_from_defaults_list(self, defaults: list[Any], repo: Any) -> DictConfig:
        """Notes on the way what was composed: group, choice, Hydra's entry for it, and its own YAML."""
        self._composed: list[tuple[str, str, Any, DictConfig]] = []
        for default in defaults:
            group, _, choice = default.config_path.rpartition("/")
            config = repo.load_config(default.config_path).config
            own = group and default.package and not group.startswith("hydra") and OmegaConf.is_dict(config)
            if own:
                self._composed.append((group, choice, default, config))
        return super()._compose_config_from_defaults_list(defaults, repo)

    def _contradictions(self, cfg: DictConfig) -> Iterator[Problem]:
        """Names other than the choice's YAML gives; of choices that build on each other the last counts."""
        names = {}
        for group, choice, default, config in self._composed:
            for key in ("name", f"{choice}.name"):  # tracking/wandb.yaml holds wandb.name
                name = OmegaConf.select(config, key)
                if name is not None:
                    names[f"{default.package}.{key}"] = (group, choice, name)
        for key, (group, choice, name) in names.items():
            found = OmegaConf.select(cfg, key)
            if found is not None and found != name:
                why = f"contradicts {group}={choice}, whose name is {name}"
                fix = f"leave {key} alone, and choose with {group}=..."
                yield Problem(key=key, value=str(found), why=why, fix=fix)

    def _lists(self, choices: Container) -> dict[str, dict[str, set[str]]]:
        """For each group that was given a list: its choices, and the keys that each sets."""
        lists: dict[str, dict[str, set[str]]] = {}
        for group, choice, default, config in self._composed:
            preset = default.parent.startswith(f"{group}/")  # a choice that another builds upon
            if group not in choices and not preset:
                lists.setdefault(group, {})[choice] = {f"{default.package}.{key}" for key in config}
        return lists


def _mixtures(lists: dict[str, dict[str, set[str]]]) -> Iterator[Problem]:
    """Hydra lays choices that share keys over each other, without a word."""
    for group, keys in lists.items():
        if any(a & b for a, b in combinations(keys.values(), 2)):
            each = ",".join(keys)
            why = "takes one choice, not several"
            fix = f"{group}={next(iter(keys))}; with --multirun, {group}={each} runs each"
            yield Problem(key=group, value=f"[{each}]", why=why, fix=fix)


@contextmanager
def hydra(args: Namespace) -> Iterator[Hydra]:
    """Hydra over soup's configuration, and what `--config-dir` adds to it.

    Raises:
        Refused: a folder named on the command line is not there, or repeats a file of soup's.
    """
    version.setbase("1.3")
    _register_launchers()
    main = conf_dir() if args.config_path is None else _folder("--config-path", args.config_path)
    search_path = create_config_search_path(f"file://{main}")
    if args.config_dir is not None:
        own = _folder("--config-dir", args.config_dir)
        _refuse_shadowed(own, main)
        search_path.prepend("command-line", f"file://{own}", SearchPathQuery(provider="schema"))
    engine = Hydra(task_name="soup", config_loader=SoupLoader(search_path))
    GlobalHydra.instance().clear()
    GlobalHydra.instance().initialize(engine)
    try:
        yield engine
    finally:
        GlobalHydra.instance().clear()


def _folder(flag: str, given: str) -> Path:
    folder = Path(given).absolute()
    if not folder.is_dir():
        why = "is not a folder" if folder.exists() else "no such folder"
        raise Refused(Problem(key=flag, value=given, why=why, fix="name the folder of your YAML files"))
    return folder


def _refuse_shadowed(own: Path, main: Path) -> None:
    """Of two files of one name Hydra takes soup's, without a word; then nothing would read the user's."""
    shadowed = [path.relative_to(main) for path in main.rglob("*.yaml")]
    shadowed = [str(path) for path in shadowed if (own / path).is_file()]
    if shadowed:
        raise Refused(
            Problem(
                key=f"--config-dir: {own / name}",
                why=f"soup has a {name} of its own, which Hydra takes instead",
                fix="give the file another name (or replace all of soup's configuration with --config-path)",
            )
            for name in sorted(shadowed)
        )


def launcher(name: str) -> ModuleType:
    """What starts and cancels sweeps of `launch=NAME`: `start(sweep, say)`, `cancel(sweep, say)`."""
    _make_importable()
    return importlib.import_module(f"{LAUNCHERS}._{name}")


def _register_launchers() -> None:
    """Makes the launchers known to Hydra, whose plugin scan does not see them in an editable install.

    hydra#2359; drop the registration when it does.
    """
    _make_importable()
    plugins = (("local", "LocalLauncher"), ("slurm", "SlurmLauncher"), ("search", "OptunaSweeper"))
    for module, name in plugins:
        Plugins.instance().register(getattr(importlib.import_module(f"{LAUNCHERS}.{module}"), name))


def _make_importable() -> None:
    """Gives the launchers one import name: a wheel has them there, a bare checkout in `launchers/`."""
    checkout = Path(__file__).resolve().parents[2] / "launchers" / "__init__.py"
    if conf_dir().parent == checkout.parents[1] and LAUNCHERS not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            LAUNCHERS, checkout, submodule_search_locations=[str(checkout.parent)]
        )
        package, _, name = LAUNCHERS.partition(".")
        try:
            parent = importlib.import_module(package)
        except ModuleNotFoundError:  # no other plugin is installed
            parent = sys.modules[package] = ModuleType(package)
            parent.__path__ = []
        module = sys.modules[LAUNCHERS] = importlib.util.module_from_spec(spec)
        setattr(parent, name, module)
        spec.loader.exec_module(module)
