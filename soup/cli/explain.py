"""Says why Hydra could not compose a command line: every mistake in it, each with its nearest remedy.

Hydra stops at its first objection. Here the overrides are taken one at a time, on the way of refusal only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher, get_close_matches
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from soup.errors import Problem

SHOW_KEYS = "`soup --cfg job` shows every key"


def explain(
    loader: ConfigLoaderImpl,
    config_name: str,
    overrides: Sequence[str],
    run_mode: RunMode,
    error: Exception,
) -> list[Problem]:
    """All problems of a command line that did not compose; `error` is what Hydra raised first."""
    problems: list[Problem] = []
    groups: list[Override] = []
    values: list[Override] = []
    parser = OverridesParser.create()
    repo = _repository(loader, config_name, overrides)
    for line in overrides:
        if line.startswith("="):  # which Hydra reads as a choice of the group ""
            problems.append(_unreadable(line, "no key"))
            continue
        try:
            override = parser.parse_overrides([line])[0]
        except OverrideParseException as unreadable:
            problems.append(_unreadable(line, str(unreadable.message)))
            continue
        objection = _sweep_objection(override, run_mode)
        if objection:
            problems.append(objection)
        elif override.is_sweep_override():
            pass  # each of its values is composed, and checked, as a point of its own
        elif override.key_or_group == "hydra.searchpath":
            groups.append(override)  # what it adds, the others need
        elif repo.group_exists(override.key_or_group) and not isinstance(override.value(), dict):
            found = list(_unknown_choices(repo, override))
            problems.extend(found)
            if override.is_add() and not found and not _composes(loader, config_name, override, run_mode):
                fix = f"drop the +: {line.removeprefix('+')}"
                problems.append(Problem(key=line, why="this group has a choice already", fix=fix))
            elif not found:
                groups.append(override)
        else:
            values.append(override)
    try:
        cfg = ConfigLoaderImpl.load_configuration(
            loader, config_name, [override.input_line for override in groups], run_mode
        )
    except Exception as broken:  # as in SoupLoader.load_configuration
        return problems or [_uncomposable(broken, overrides, config_name, loader)]
    OmegaConf.set_struct(cfg, True)
    for override in values:
        try:
            ConfigLoaderImpl._apply_overrides_to_config([override], cfg)
        except Exception as rejected:  # as above
            problems.append(_rejected(loader, repo, cfg, override, rejected))
    return problems or [_uncomposable(error, overrides, config_name, loader)]


def _repository(
    loader: ConfigLoaderImpl, config_name: str, overrides: Sequence[str]
) -> CachingConfigRepository:
    """Everything that can be composed from, with the folders of `hydra.searchpath` where they can be read."""
    paths = [line for line in overrides if line.startswith("hydra.searchpath=")]
    try:
        return loader._parse_overrides_and_create_caching_repo(config_name, paths)[1]
    except Exception:  # as in SoupLoader.load_configuration
        return CachingConfigRepository(loader.repository)


def _composes(loader: ConfigLoaderImpl, config_name: str, override: Override, run_mode: RunMode) -> bool:
    try:
        ConfigLoaderImpl.load_configuration(loader, config_name, [override.input_line], run_mode)
    except Exception:  # as in SoupLoader.load_configuration
        return False
    return True


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known full keys most like `word`, also by their last part: `lr` finds `optim.lr`."""
    leaf = word.rpartition(".")[2]

    def likeness(key: str) -> float:
        whole = SequenceMatcher(None, word, key).ratio()
        return max(whole, 0.95 * SequenceMatcher(None, leaf, key.rpartition(".")[2]).ratio())

    candidates = {key for key in known if not word.startswith(f"{key}.")}
    ranked = sorted(((likeness(key), key) for key in candidates), reverse=True)
    return [key for score, key in ranked[:count] if score >= max(0.7, ranked[0][0] - 0.1)]


def _unreadable(line: str, reason: str) -> Problem:
    key, equals, value = line.partition("=")
    if not equals or not key:
        return Problem(key=line, why="is not of the form key=value", fix=f"write key=value; {SHOW_KEYS}")
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return Problem(
        key=line,
        why=f"cannot be read as key=value ({_plain(reason)})",
        fix=f"if the value is text with special characters, quote it: '{key}=\"{quoted}\"'",
    )


def _typed(override: Override) -> tuple[str, str | None]:
    """The key and the value as they were typed; `~key` has no value."""
    key, equals, value = str(override.input_line).partition("=")
    return key, value if equals else None


def _sweep_objection(override: Override, run_mode: RunMode) -> Problem | None:
    if not override.is_sweep_override():
        return None
    key, value = _typed(override)
    if run_mode == RunMode.RUN:
        fix = "add --multirun"
        if override.value_type == ValueType.SIMPLE_CHOICE_SWEEP:
            fix += f"; or {key}=[{value}] for a list, or '{key}=\"{value}\"' for text"
        return Problem(key=key, value=value, why="several values make a sweep", fix=fix)
    if override.is_hydra_override():
        return Problem(key=key, value=value, why="Hydra's own settings cannot be swept", fix="give one value")
    return None


def _unknown_choices(repo: CachingConfigRepository, override: Override) -> Iterator[Problem]:
    group, value = override.key_or_group, override.value()
    if override.is_delete():
        return
    options = repo.get_group_options(group)
    for choice in value if isinstance(value, list) else [value]:
        if not isinstance(choice, str):
            shown = _typed(override)[1]
            yield Problem(
                key=group, value=shown, why="a choice is a name", fix=f"one of: {', '.join(options)}"
            )
        elif not repo.config_exists(f"{group}/{choice}"):
            yield _unknown_choice(group, choice, options)


def _unknown_choice(group: str, choice: str, options: Sequence[str]) -> Problem:
    close = get_close_matches(choice, options, n=len(options), cutoff=0.5)
    ordered = [*close, *(option for option in options if option not in close)]
    fix = f"choices: {', '.join(ordered)}"
    return Problem(
        key=group,
        value=choice,
        why="no such choice",
        fix=f"did you mean {group}={close[0]}? {fix}" if close else fix,
    )


def _rejected(
    loader: ConfigLoaderImpl,
    repo: CachingConfigRepository,
    cfg: DictConfig,
    override: Override,
    error: Exception,
) -> Problem:
    key, value = _typed(override)
    groups = [group for group in repo.get_group_options("", ObjectType.GROUP) if group != "hydra"]
    path = override.key_or_group
    known = list(_keys(cfg, with_hydra=path.startswith("hydra")))
    if override.package is not None or "/" in path or "@" in key:
        return Problem(
            key=key, value=value, why="no such group", fix=f"groups: {', '.join(_near_first(path, groups))}"
        )
    if path in known and override.is_add():
        fix = f"drop the +: {path}={value}"
        return Problem(key=key, value=value, why="this key is there already", fix=fix)
    if path in known or override.is_add() or override.is_force_add():
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        return Problem(key=key, value=value, why=_plain(cause), fix=f"correct or drop it; {SHOW_KEYS}")
    elsewhere = _choices_with(loader, repo, path)
    close = nearest(path, [*known, *groups])
    fix = SHOW_KEYS
    if elsewhere:
        fix = f"of the choices {', '.join(elsewhere)} ha{'s' if len(elsewhere) == 1 else 've'} it; {fix}"
    elif close:
        fix = f"did you mean {' or '.join(close)}? {fix}"
    return Problem(key=key, value=value, why="no such key", fix=fix)


def _choices_with(loader: ConfigLoaderImpl, repo: CachingConfigRepository, path: str) -> list[str]:
    """`group=choice` for each choice of the key's group that has the key, as `optim=galore` has its rank."""
    group = path.partition(".")[0]
    if group == "hydra":
        return []
    found = []
    for choice in repo.get_group_options(group):
        try:
            defaults = create_defaults_list(repo, f"{group}/{choice}", [], False, True)
            alone = loader._compose_config_from_defaults_list(defaults.defaults, repo)
        except Exception:  # a choice that does not compose alone is no suggestion
            continue
        if path in _keys(alone, with_hydra=False):
            found.append(f"{group}={choice}")
    return found


def _keys(cfg: Any, with_hydra: bool, prefix: str = "") -> Iterator[str]:
    if not isinstance(cfg, DictConfig) or cfg._is_none() or cfg._is_missing():
        return
    for key, node in cfg.items_ex(resolve=False):
        if not prefix and key == "hydra" and not with_hydra:
            continue
        yield f"{prefix}{key}"
        yield from _keys(node, with_hydra, f"{prefix}{key}.")


def _uncomposable(
    error: Exception, overrides: Sequence[str], config_name: str, loader: ConfigLoaderImpl
) -> Problem:
    """What is wrong in the YAML, or with the overrides taken together."""
    if isinstance(error, yaml.YAMLError):
        mark = getattr(error, "problem_mark", None)
        where = f"{mark.name}:{mark.line + 1}" if mark else "configuration"
        why = getattr(error, "problem", None) or _plain(error)
        return Problem(key=where, why=f"not valid YAML: {why}", fix="correct the file")
    if isinstance(error, MissingConfigException):
        missing = error.missing_cfg_file or config_name
        if missing == config_name:
            options = [name for name in loader.get_group_options("") if not name.startswith("_")]
            return Problem(
                key="--config-name",
                value=missing,
                why="no such configuration",
                fix=f"one of: {', '.join(_near_first(missing, options))}; --config-dir adds a folder",
            )
        group, _, choice = missing.rpartition("/")
        if error.options:
            return _unknown_choice(group, choice, error.options)
        return Problem(key=missing, why=_plain(error), fix="correct the defaults list that names it")
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    return Problem(
        key=" ".join(overrides) or config_name,
        why=_plain(cause),
        fix="correct it; `soup --info defaults-tree` shows what composes what",
    )


def _near_first(word: str, options: Sequence[str]) -> list[str]:
    close = get_close_matches(word, options, n=len(options), cutoff=0.5)
    return [*close, *(option for option in options if option not in close)]


def _plain(error: BaseException | str) -> str:
    """An exception's message on one line, without lists of search paths and the like."""
    text = str(error).strip() or type(error).__name__
    return " ".join(line.strip() for line in text.splitlines() if not line.startswith(("    ", "\t")))
