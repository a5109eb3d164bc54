"""From a resolved configuration to frozen specs: strict types, no unknown key, every problem at once.

The signature of a choice's function is its schema (see `soup.choices`); `name` in a group's node says which.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from soup import specs
from soup.errors import Problem, Refused

GROUPS = ("model", "data", "task", "backend", "lora", "optim", "distributed", "longctx", "tracking", "launch")
SECTIONS = ("training", "run")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A checked configuration. `tree` is the plain resolved form that is hashed and saved."""

    tree: Mapping[str, Any]
    model: specs.ModelSpec
    data: specs.DataSpec
    task: specs.TaskSpec
    backend: specs.BackendSpec
    lora: specs.LoraSpec
    optim: specs.OptimSpec
    distributed: specs.DistributedSpec
    longctx: specs.LongctxSpec
    tracking: tuple[specs.TrackerSpec, ...]
    launch: specs.LaunchSpec
    training: specs.TrainingSpec
    run: specs.RunSpec

    @property
    def replicas(self) -> int:
        """Processes that read rows of their own: one of each ring."""
        ring = self.longctx.ring_size if self.longctx.use_ring_attention else 1
        return max(1, self.distributed.world // ring)

    def specs(self) -> tuple[specs.Spec, ...]:
        """Every spec of the configuration."""
        single = [getattr(self, group) for group in (*GROUPS, *SECTIONS) if group != "tracking"]
        return (*single, *self.tracking)

    def distributions(self) -> set[str]:
        """Names of the packages that its settings need."""
        return {package.distribution for spec in self.specs() for package in spec.requires}


def check(tree: Mapping[str, Any]) -> Config:
    """Validates a resolved configuration.

    Raises:
        Refused: with one problem per wrong, missing or unknown key.
    """
    problems = list(_unknown("", tree, (*GROUPS, *SECTIONS)))
    parts: dict[str, Any] = {}
    for group in (*GROUPS, *SECTIONS):
        node = tree.get(group)
        try:
            if not isinstance(node, Mapping):
                raise Refused(
                    Problem(
                        key=group, value=node, why="is not a group of keys", fix=f"choose one with {group}="
                    )
                )
            if group == "tracking":
                parts[group] = tuple(_spec(group, child, f"tracking.{name}") for name, child in node.items())
            else:
                parts[group] = _spec(group, node, group)
        except Refused as refused:
            problems.extend(refused.problems)
    if problems:
        raise Refused(problems)
    return Config(tree=tree, **parts)


def choice_function(group: str, name: str) -> Callable[..., specs.Spec] | None:
    """The function behind `group=name`, or `None`. Sections have one, named after themselves."""
    return _functions(group).get(name)


def merge_arguments(config: Config) -> dict[str, tuple[Any, str]]:
    """The trainer's arguments of all specs: argument to (value, the group or section that sets it).

    Raises:
        Refused: two choices set one argument to different values.
    """
    merged: dict[str, tuple[Any, str]] = {}
    for group in (*GROUPS, *SECTIONS):
        spec = getattr(config, group)
        for one in spec if isinstance(spec, tuple) else (spec,):
            for argument, value in one.args.items():
                earlier = merged.setdefault(argument, (value, group))
                if earlier[0] != value:
                    raise Refused(
                        Problem(
                            key=group,
                            why=f"sets {argument}={value!r}, and {earlier[1]} sets it to {earlier[0]!r}",
                            fix=f"change {group} or {earlier[1]}",
                        )
                    )
    return merged


@cache
def _functions(group: str) -> dict[str, Callable[..., specs.Spec]]:
    module = importlib.import_module(f"soup.choices.{group}")
    return {
        name: function
        for name, function in vars(module).items()
        if inspect.isfunction(function) and function.__module__ == module.__name__ and name[0] != "_"
    }


@cache
def _validated(function: Callable[..., specs.Spec]) -> Callable[..., specs.Spec]:
    from pydantic import ConfigDict, validate_call

    return validate_call(config=ConfigDict(strict=True, allow_inf_nan=False))(function)


def _spec(group: str, node: Any, key: str) -> specs.Spec:
    """Calls the choice's function with the node's keys."""
    from pydantic import ValidationError

    if not isinstance(node, Mapping):
        raise Refused(Problem(key=key, value=node, why="is not a group of keys", fix=f"choose with {group}="))
    parameters = {str(name): value for name, value in node.items()}
    name = group if group in SECTIONS else parameters.pop("name", None)
    function = choice_function(group, name) if isinstance(name, str) else None
    if function is None:
        known = ", ".join(sorted(_functions(group)))
        raise Refused(
            Problem(key=f"{key}.name", value=name, why="is no such function", fix=f"one of: {known}")
        )
    try:
        return _validated(function)(**parameters)
    except ValidationError as error:
        raise Refused(_problems(error, key, function)) from error


def _problems(error: Any, key: str, function: Callable[..., specs.Spec]) -> list[Problem]:
    """One problem per key; the alternatives of a union are joined."""
    known = list(inspect.signature(function).parameters)
    by_leaf: dict[str, list[dict[str, Any]]] = {}
    for one in error.errors(include_url=False):
        by_leaf.setdefault(str(one["loc"][0]), []).append(one)
    problems: list[Problem] = []
    for leaf, errors in by_leaf.items():
        first = errors[0]
        if first["type"] == "unexpected_keyword_argument":
            problems.extend(_unknown(key, [leaf], known))
        elif first["type"] == "missing_keyword_only_argument":
            problems.append(Problem(key=f"{key}.{leaf}", why="is missing", fix=f"{key}.{leaf}=VALUE"))
        else:
            messages = dict.fromkeys(_message(one) for one in errors)
            problems.append(
                Problem(
                    key=f"{key}.{leaf}",
                    value=_shown(first["input"]) if len(first["loc"]) == 1 else first["input"],
                    why="; or ".join(messages),
                    fix=f"{key}.{leaf}={_example(errors)}",
                )
            )
    return problems


def _shown(value: Any) -> Any:
    return "null" if value is None else value


def _message(error: Mapping[str, Any]) -> str:
    """pydantic's message in soup's voice: `must be greater than 0`."""
    if error["type"] in ("string_too_short", "too_short"):
        return "must not be empty"
    message = str(error["msg"])
    return message.replace("Input should be", "must be").replace("Value should have", "must have")


def _example(errors: Iterable[Mapping[str, Any]]) -> str:
    """What a right value looks like, from the constraint that failed."""
    for error in errors:
        context = error.get("ctx") or {}
        if "expected" in context:
            return str(context["expected"]).replace("'", "").replace(" or ", ", ").split(", ")[0]
        for bound in ("ge", "le"):
            if bound in context:
                return str(context[bound])
    kinds = {"int": "A_WHOLE_NUMBER", "float": "A_NUMBER", "bool": "true", "string": "TEXT", "list": "[...]"}
    return next(
        (text for kind, text in kinds.items() if any(e["type"].startswith(kind) for e in errors)), "VALUE"
    )


def _unknown(prefix: str, found: Iterable[Any], known: Iterable[str]) -> Iterable[Problem]:
    known = list(known)
    for leaf in found:
        if leaf in known:
            continue
        dot = f"{prefix}." if prefix else ""
        near = difflib.get_close_matches(str(leaf), known, n=1, cutoff=0.5)
        yield Problem(
            key=f"{dot}{leaf}",
            why="is not a key" + (f" of {prefix}" if prefix else ""),
            fix=f"did you mean {dot}{near[0]}?" if near else f"known: {', '.join(dot + k for k in known)}",
        )
