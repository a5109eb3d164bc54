"""`soup why [overrides]`: which rules speak about this combination."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from soup import rules
from soup.cli.compose import Point
from soup.device import resolve
from soup.errors import Refused
from soup.model import source
from soup.schema import Config, check


def why(points: Sequence[Point], args: Namespace) -> int:  # noqa: ARG001
    """Prints the rules that hold, then those about what the command line set that nearly hold."""
    from rich.console import Console

    console = Console(highlight=False)
    for point in points:
        config = check(point.tree)
        device = resolve(config.launch.device)
        found = rules.facts(config, device=device.kind, model_config=_model_config(config))
        console.print(f"device={device.kind}: {device.reason}")
        named = {word.lstrip("+~").partition("=")[0].partition("@")[0] for word in point.overrides}
        holding = [rule for rule in rules.RULES if rule.holds(found)]
        for rule in holding:
            problem = rule.problem(found)
            console.print(f"\nrefused: {rule.condition()}", style="red")
            console.print(
                f"    {problem.why}" + (f" [{problem.source}]" if problem.source else ""), markup=False
            )
            console.print(f"    fix: {problem.fix}", markup=False)
        if not holding:
            console.print("\nno rule speaks against this combination", style="green")
        near = rules.about(found, named)
        if near:
            console.print("\none more condition away:")
            for rule in near:
                console.print(f"    {rule.condition()}: {rule.why}", markup=False)
    return 0


def _model_config(config: Config) -> Mapping[str, Any] | None:
    """The model's config.json where it is at hand; a rule about a model that cannot be had is not asked."""
    try:
        return source.described(config.model, weights=False).config
    except Refused:
        return None
