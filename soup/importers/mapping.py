"""What a table of keys says of each: where its value goes, that soup does the same anyway, or why it goes nowhere.

A table maps a key of the tool, dotted where nested, to an entry: a function of its value and the whole file, which
returns what becomes of it. A key that no table has is left, and said so; nothing is dropped and nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Put:
    """A key of soup, and its value."""

    key: str
    value: Any


@dataclass(frozen=True)
class Choose:
    """A choice of a group."""

    group: str
    choice: str


@dataclass(frozen=True)
class Same:
    """Nothing to set: soup does this anyway, or the key says nothing."""

    why: str


@dataclass(frozen=True)
class Leave:
    """No counterpart in soup, and why."""

    why: str


Outcome = Put | Choose | Same | Leave
File = Mapping[str, Any]
Entry = Callable[[Any, File], list[Outcome]]


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool whose files can be imported.

    `model`: the key that names the model, which every file has. `signs`: others of which a file has one at least, where
    another tool's files name their model alike. `table`: its keys. `defaults`: what it does where a file
    says nothing, by its own keys, `file -> values`. `finish`: outcomes that several keys decide together.
    """

    name: str
    version: str
    model: str
    signs: frozenset[str] = frozenset()
    table: Mapping[str, Entry]
    defaults: Callable[[File], Mapping[str, Any]]
    finish: Callable[[File], list[tuple[str, Outcome]]] = lambda _: []
    needs_task: bool = False


@dataclass
class Translated:
    """`put` and `chosen` hold what goes where, with the tool's key that says so; `same` and `left` the reasons."""

    put: dict[str, tuple[Any, str]] = field(default_factory=dict)
    chosen: dict[str, tuple[str, str]] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def translate(tool: Tool, file: File) -> Translated:
    """Every key of the file, and the tool's defaults where the file is silent."""
    found = Translated()
    stated = dict(_flat(file, tool.table))
    for key, value in stated.items():
        entry = tool.table.get(key)
        outcomes = _outcomes(tool, entry, value, file)
        _take(found, key, key, outcomes)
    for key, value in tool.defaults(file).items():
        if stated.get(key) is None:
            for one in _outcomes(tool, tool.table[key], value, file):
                silent = (isinstance(one, Put) and one.key not in found.put) or (
                    isinstance(one, Choose) and one.group not in found.chosen
                )
                if silent:
                    _take(found, key, f"{tool.name}'s default", [one])
    for key, outcome in tool.finish(file):
        _take(found, key, key, [outcome])
    return found


def _outcomes(tool: Tool, entry: Entry | None, value: Any, file: File) -> list[Outcome]:
    if entry is None:
        why = f"is none of the keys of {tool.name} {tool.version} that soup knows, and nothing is taken of it"
        return [Leave(why)]
    if value is None:
        return [Same("has no value")]
    try:
        return entry(value, file)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        return [Leave(f"cannot be read: {str(error).splitlines()[0]}")]


def _take(found: Translated, key: str, source: str, outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, Put):
            _settle(found, found.put, outcome.key, outcome.value, source)
        elif isinstance(outcome, Choose):
            _settle(found, found.chosen, outcome.group, outcome.choice, source)
        elif isinstance(outcome, Same):
            found.same[key] = outcome.why
        else:
            found.left[key] = outcome.why


def _settle(
    found: Translated, settled: dict[str, tuple[Any, str]], place: str, value: Any, source: str
) -> None:
    """Several keys may say the same of one place; where they differ the last is taken, and the others are listed."""
    before, by = settled.get(place, (value, ""))
    if before != value:
        found.left[by] = f"{source} says {place}={value}, and is taken"
        by = ""
    settled[place] = (value, ", ".join(dict.fromkeys([*filter(None, [by]), source])))


def _flat(node: File, table: Mapping[str, Entry], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by their dotted keys; what the table names is a leaf, and so is a mapping that holds nothing it names."""
    for name, value in node.items():
        key = f"{prefix}{name}"
        below = any(known.startswith(f"{key}.") for known in table)
        if key not in table and below and isinstance(value, Mapping):
            yield from _flat(value, table, f"{key}.")
        else:
            yield key, value


def settle(found: Translated) -> None:
    """Once it is known whether there are several processes."""
    if TIMEOUT in found.put and found.chosen.get("distributed", ("none", ""))[0] == "none":
        _, key = found.put.pop(TIMEOUT)
        found.same[key] = "one process waits for no other"


# Entries


def to(key: str, kind: Callable[[Any], Any] = str) -> Entry:
    """The value goes to a key of soup, as `kind`: YAML reads 2e-5 as text."""
    return lambda value, _: [Put(key, kind(value))]


def each(entries: Mapping[Any, list[Outcome] | Outcome], why: str) -> Entry:
    """A few values are known; of another `why` says what is the matter with it."""

    def entry(value: Any, _: File) -> list[Outcome]:
        known = entries.get(value) if not isinstance(value, list | dict) else None
        if known is None:
            return [Leave(why)]
        return known if isinstance(known, list) else [known]

    return entry


def same(*values: Any, why: str, otherwise: str) -> Entry:
    """These values are what soup does."""
    return lambda value, _: [Same(why) if value in values else Leave(otherwise)]


def leave(why: str) -> Entry:
    return lambda *_: [Leave(why)]


def nothing(why: str) -> Entry:
    return lambda *_: [Same(why)]


def when(condition: Callable[[File], Any], entry: Entry, otherwise: str) -> Entry:
    """The entry where the file switches its feature on; else the key says nothing."""
    return lambda value, file: entry(value, file) if condition(file) else [Same(otherwise)]


def switch(key: str) -> Entry:
    """A flag that is a flag of soup's too."""
    return to(key, flag)


def flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "yes", "1"):
        return True
    if str(value).lower() in ("false", "no", "0"):
        return False
    raise ValueError(f"{value!r} is neither true nor false")


def whole(value: Any) -> int:
    if isinstance(value, bool) or float(value) != int(float(value)):
        raise ValueError(f"{value!r} is no whole number")
    return int(float(value))


def counted(key: str) -> Entry:
    """A number of steps, which transformers takes for a share of all of them below 1."""
    return lambda value, _: (
        [Put(key, whole(value))] if float(value) >= 1 else [Leave(f"soup counts steps, not shares: {key}")]
    )


def at(file: File, path: str, default: Any = None) -> Any:
    """The value at a dotted key, or the default where there is none."""
    node: Any = file
    for name in path.split("."):
        if not isinstance(node, Mapping) or node.get(name) is None:
            return default
        node = node[name]
    return node


# What several tools share

SCHEDULERS = {name: Put("optim.scheduler", name) for name in ("cosine", "linear", "constant")}
SCHEDULERS["constant_with_warmup"] = Put("optim.scheduler", "constant")
SCHEDULER = each(SCHEDULERS, "soup has cosine, linear and constant, after a warm-up")
OPTIMIZERS: dict[Any, list[Outcome] | Outcome] = {
    "adamw_torch": Choose("optim", "adamw"),
    "adamw_torch_fused": Choose("optim", "adamw"),
    "adamw_hf": Choose("optim", "adamw"),
    "paged_adamw_32bit": [
        Choose("optim", "adamw"),
        Leave("soup's AdamW keeps its state where the weights are; optim=paged_adamw_8bit pages it"),
    ],
    "adamw_8bit": Choose("optim", "adamw_8bit"),
    "adamw_bnb_8bit": Choose("optim", "adamw_8bit"),
    "paged_adamw_8bit": Choose("optim", "paged_adamw_8bit"),
    "adafactor": Choose("optim", "adafactor"),
    "lion_32bit": Choose("optim", "lion"),
    "schedule_free_adamw": Choose("optim", "schedule_free"),
    "muon": Choose("optim", "muon"),
}
OPTIMIZER = each(
    OPTIMIZERS,
    "soup has no such optimizer, and takes adamw; it has adamw_8bit, paged_adamw_8bit, adafactor, lion, muon, galore "
    "and schedule_free too",
)
PLACE = "runs lie under run.root, each at the hash of its configuration"
LOADER = "how rows are read makes no difference to what is learnt; soup has data.num_proc"
HUB = "soup uploads when asked to: soup runs push RUN NAME"
RESUME = "the same command again continues the same run"
SHARDS = {
    "zero2": "zero2", "zero3": "zero3", "zero2_offload": "zero2_offload",
    "ds_z2_config": "zero2", "ds_z3_config": "zero3", "ds_z2_offload_config": "zero2_offload",
    "zero3_bf16": "zero3",
}  # fmt: skip
# As they are written for `fsdp`, in a list or with blanks between.
FSDP = {"full_shard": "fsdp_full_shard", "shard_grad_op": "fsdp_shard_grad"}
TIMEOUT = "distributed.timeout_s"  # which one process has not: `settle` takes it away there
COUNT = "how many processes there are is not in this file: distributed.processes=N"


def deepspeed(value: Any, _file: File) -> list[Outcome]:
    """A configuration of DeepSpeed's, from the file that it names or from the names of the tools' own files."""
    import json
    from pathlib import Path

    path = Path(str(value))
    if path.is_file():
        zero = json.loads(path.read_text()).get("zero_optimization", {})
        stage, offload = zero.get("stage"), zero.get("offload_optimizer", {}).get("device", "none") != "none"
        name = f"zero{stage}{'_offload' if offload else ''}"
    else:
        name = SHARDS.get(path.name.removesuffix(".json"), "")
    if name not in ("zero2", "zero3", "zero2_offload"):
        return [Leave("not one of soup's; --deepspeed zero2, zero3 or zero2_offload says which is meant")]
    return [Choose("distributed", name)]


def fsdp(value: Any, _file: File) -> list[Outcome]:
    """transformers' `fsdp`."""
    words = value.split() if isinstance(value, str) else [str(one) for one in value]
    named = [FSDP[one] for one in words if one in FSDP]
    if not words:
        return [Same("off")]
    if len(named) != 1:
        return [Leave("soup shards all, or gradients and optimizer state: --fsdp full_shard or shard_grad")]
    return [Choose("distributed", "fsdp_full_offload" if "offload" in words else named[0])]


def warmup_steps(steps_key: str) -> Entry:
    """soup counts the warm-up as a share of all steps, which a file has only beside max_steps."""

    def entry(value: Any, file: File) -> list[Outcome]:
        if not float(value):
            return [Put("optim.warmup_ratio", 0.0)]
        if 0 < float(value) < 1:  # transformers 5 takes it for a share
            return [Put("optim.warmup_ratio", float(value))]
        total = at(file, steps_key)
        if total is None or float(total) <= 0:
            return [
                Leave(
                    "soup has a share of all steps, optim.warmup_ratio, and how many there are is not in this file"
                )
            ]
        return [Put("optim.warmup_ratio", float(value) / float(total))]

    return entry


def trackers(value: Any, _file: File) -> list[Outcome]:
    """`report_to`, a name or a list."""
    names = [value] if isinstance(value, str) else list(value)
    known = [name for name in names if name in ("wandb", "tensorboard", "mlflow", "trackio")]
    unknown = [str(name) for name in names if name not in known and name != "none"]
    found: list[Outcome] = (
        [Choose("tracking", f"[{','.join(known)}]" if len(known) > 1 else known[0])] if known else []
    )
    if unknown:
        found.append(Leave(f"soup has no tracker {', '.join(unknown)}"))
    return found or [Same("soup writes metrics.jsonl beside each run")]


def sources(values: list[str]) -> Outcome:
    return Put("data.train", values[0] if len(values) == 1 else values)


def targets(value: Any, every: tuple[str, ...] = ("all-linear",)) -> list[Outcome]:
    """Names of layers, in a list or with commas between, or the tool's word for all linear layers."""
    if isinstance(value, str) and value in every:
        return [Put("lora.target_modules", "all-linear")]
    names = (
        [name.strip() for name in value.split(",")] if isinstance(value, str) else [str(one) for one in value]
    )
    return [Put("lora.target_modules", names)]
