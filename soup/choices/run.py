"""The `run` section: where the run lies and whether it continues an earlier one."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Len

from soup.specs import RunSpec

Name = Annotated[str, Len(1)]


def run(*, root: Name, name: Name | None, objective: Name, resume: Literal["auto", "never"]) -> RunSpec:
    """`objective`: the logged metric that a sweep sorts and prunes by, smallest first; after a minus, largest first."""
    return RunSpec(root=root, name=name, objective=objective, resume=resume)
