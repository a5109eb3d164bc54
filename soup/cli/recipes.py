"""`soup recipes [SEARCH]`: the experiments that there are, and what each is for."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

from soup.cli.loader import conf_dir
from soup.comments import header


def recipes(words: list[str], args: Namespace) -> int:
    """Lists experiments, soup's own and those of `--config-dir`; with words, those that have all of them."""
    folders = [conf_dir(), *([Path(args.config_dir)] if args.config_dir else [])]
    found = [_about(path) for folder in folders for path in sorted((folder / "experiment").glob("*.yaml"))]
    wanted = [word.lower() for word in words]
    chosen = [
        one for one in found if all(word in " ".join(map(str, one.values())).lower() for word in wanted)
    ]
    if args.json:
        print(json.dumps(chosen, indent=2))
        return 0
    if not chosen:
        print(f"no recipe has {' and '.join(words)}; `soup recipes` lists all {len(found)}")
        return 0
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("experiment=", "task", "model", "what it is for"):
        table.add_column(column, overflow="fold", no_wrap=column in ("experiment=", "task"))
    for one in chosen:
        one = one | {"says": one["says"].partition(". ")[0].rstrip(".")}
        table.add_row(*(escape(one[key]) for key in ("name", "task", "model", "says")))
    Console(highlight=False).print(table)
    print(
        "\nnext: soup plan experiment=NAME    what it would cost; then: soup experiment=NAME data.train=FILE"
    )
    return 0


def _about(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    tree = yaml.safe_load(text) or {}
    chosen: dict[str, str] = {}
    for entry in tree.get("defaults", []):
        if isinstance(entry, dict):
            chosen |= {
                key.removeprefix("override").strip().lstrip("/"): value for key, value in entry.items()
            }
    model = (tree.get("model") or {}).get("base") or "SmolLM2-135M-Instruct"
    return {"name": path.stem, "task": chosen.get("task", "sft"), "model": model, "says": header(text)}
