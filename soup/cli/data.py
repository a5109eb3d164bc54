"""`soup data [overrides]`: the first rows as the model sees them, lengths, and what was left out."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from soup import inputs, rules
from soup.cli.compose import Point
from soup.device import resolve
from soup.errors import Refused
from soup.model import source
from soup.schema import check

ROWS = 3


def data(points: Sequence[Point], args: Namespace) -> int:  # noqa: ARG001
    """Prepares the data of each point as a run would, and shows it."""
    from rich.console import Console

    from soup.data.encode import Encoder
    from soup.data.prepare import prepare
    from soup.data.show import show

    for point in points:
        config = check(point.tree)
        facts = rules.facts(config, device=resolve(config.launch.device).kind, model_config=None)
        if problems := [p for p in rules.broken(facts) if p.key.startswith(("data.", "training.packing"))]:
            raise Refused(problems)
        folder = source.folder(config.model, weights=False)
        prepared = prepare(**inputs.data_arguments(config, folder))
        encoder = Encoder(
            folder,
            chat_template=config.model.chat_template,
            max_length=config.data.max_length,
            on_too_long=config.data.on_too_long,
        )
        console = Console(highlight=False)
        for split, one in prepared.items():
            console.rule(split, align="left")
            show(one, encoder, ROWS if split == "train" else 1, console)
    return 0
