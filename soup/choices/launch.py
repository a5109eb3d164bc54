"""`launch=`: where runs execute."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Len

from soup.specs import LaunchSpec, Package

Device = Literal["auto", "cpu", "cuda"]
Invalid = Literal["refuse", "skip"]
Count = Annotated[int, Ge(1)]
Name = Annotated[str, Len(1)]


def local(*, device: Device, slots: Count | Literal["auto"], wait: bool, invalid: Invalid) -> LaunchSpec:
    """This machine; `slots` runs at a time share its cores and GPUs."""
    return LaunchSpec(device=device, slots=slots, wait=wait, invalid=invalid)


def slurm(
    *,
    device: Device,
    slots: Count,
    wait: bool,
    invalid: Invalid,
    partition: Name | None,
    account: Name | None,
    qos: Name | None,
    gpus: Annotated[int, Ge(0)] | Literal["auto"],
    cpus: Count,
    mem_gb: Count | None,
    time: Count,
    array_parallelism: Count,
    dry_run: bool,
) -> LaunchSpec:
    """A SLURM job array through submitit. `time`: limit of one job, in minutes."""
    return LaunchSpec(
        device=device,
        slots=slots,
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
            "array_parallelism": array_parallelism,
            "dry_run": dry_run,
        },
        requires=(Package(distribution="submitit", extra="slurm"),),
    )
