"""`launch=`: where runs execute."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from annotated_types import Ge, Len

from soup.errors import Problem, Refused
from soup.specs import LaunchSpec, Package

Device = Literal["auto", "cpu", "cuda"]
Invalid = Literal["refuse", "skip"]
Count = Annotated[int, Ge(1)]
Name = Annotated[str, Len(1)]

# sbatch's options that soup sets itself: from a key, or to find its jobs and their files again.
KEYS = {
    "partition": "launch.partition",
    "account": "launch.account",
    "qos": "launch.qos",
    "gpus-per-node": "launch.gpus",
    "cpus-per-task": "launch.cpus",
    "mem": "launch.mem_gb",
    "time": "launch.time",
    "signal": "launch.grace_s",
    "nodes": "distributed.nodes",
    "ntasks": "distributed.processes",
    "ntasks-per-node": "distributed.processes",
}
OWN = (
    "array",
    "job-name",
    "output",
    "error",
    "open-mode",
    "chdir",
    "requeue",
    "no-requeue",
    "wrap",
    "parsable",
)


def local(*, device: Device, slots: Count | Literal["auto"], wait: bool, invalid: Invalid) -> LaunchSpec:
    """This machine; `slots` runs at a time share its cores and GPUs."""
    return LaunchSpec(device=device, slots=slots, wait=wait, invalid=invalid)


def slurm(
    *,
    device: Device,
    wait: bool,
    invalid: Invalid,
    partition: Name | None,
    account: Name | None,
    qos: Name | None,
    gpus: Annotated[int, Ge(0)] | Literal["auto"],
    cpus: Count,
    mem_gb: Count | None,
    time: Count,
    grace_s: Count,
    max_requeues: Annotated[int, Ge(0)],
    array_parallelism: Count,
    setup: list[str],
    extra: dict[str, str | int | bool] | None,
    dry_run: bool,
) -> LaunchSpec:
    """A SLURM job array through submitit, a job for each run.

    `time`: limit of one job, in minutes. `extra`: further options of sbatch, by their long names.
    """
    options = {option.replace("_", "-"): value for option, value in (extra or {}).items()}
    problems = _misused(options)
    if grace_s >= time * 60:
        why = f"a job of launch.time={time} minutes would be told to stop before it starts"
        fix = f"launch.grace_s={time * 30}, or more launch.time"
        problems.append(Problem(key="launch.grace_s", value=grace_s, why=why, fix=fix))
    if problems:
        raise Refused(problems)
    return LaunchSpec(
        device=device,
        slots=1,
        wait=wait,
        invalid=invalid,
        slurm={
            "partition": partition,
            "account": account,
            "qos": qos,
            "gpus": gpus,
            "cpus": cpus,
            "mem_gb": mem_gb,
            "time": time,
            "grace_s": grace_s,
            "max_requeues": max_requeues,
            "array_parallelism": array_parallelism,
            "setup": tuple(setup),
            "extra": options,
            "dry_run": dry_run,
        },
        requires=(Package(distribution="submitit", extra="slurm"),),
    )


def _misused(options: dict[str, str | int | bool]) -> list[Problem]:
    problems = []
    for option, value in options.items():
        key = f"launch.extra.{option}"
        if not re.fullmatch(r"[a-z][a-z0-9-]+", option):
            why, fix = "is no long option of sbatch", "launch.extra={constraint: a100}, for example"
        elif option in KEYS:
            why, fix = "has a key of its own", f"{KEYS[option]}={value}"
        elif option in OWN:
            why, fix = "soup sets it, to find its jobs and what they wrote again", f"drop {key}"
        elif value is False:
            why, fix = "an option of sbatch is given or it is not", f"drop {key}"
        elif "\n" in str(value):
            why, fix = "is a line of a script", "a value without line breaks"
        else:
            continue
        problems.append(Problem(key=key, value=value, why=why, fix=fix))
    return problems
