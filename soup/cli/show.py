"""What Hydra's own flags show: `--cfg`, `--info`, `--hydra-help`; and soup's `--help`."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from textwrap import shorten

from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import Container, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from soup.cli.compose import unresolved
from soup.cli.loader import hydra
from soup.cli.main import COMMANDS
from soup.errors import Problem, Refused

HELP = """\
soup [COMMAND] [group=choice] [key=value] [flags]: fine-tunes language models.
{commands}
Groups; the first choice is what you get if you say nothing
{groups}
  soup experiment=quickstart                      the demo; `soup recipes`: more
  soup data.train=rows.jsonl training.epochs=3    your own rows
  soup --multirun lora.r=8,16 optim.lr=1e-4,2e-4  a sweep of 4; sweep.random=
Flags: --json  --config-dir DIR of your own YAML  --cfg job  --info  --version
       --shell-completion install=bash (zsh, fish)    in any order, all of it
"""


TOGETHER = "status logs cancel retry"


def show(args: Namespace) -> int:
    """Prints what `--cfg`, `--info` or `--hydra-help` asks for.

    Raises:
        Refused: the configuration does not compose, or lacks the package asked for.
    """
    with hydra(args) as engine:
        if args.hydra_help:
            args.overrides = [line for line in args.overrides if line.lstrip("+~").startswith("hydra")]
            engine.hydra_help(args.config_name, get_args_parser(), args)
        elif args.cfg:
            _show_cfg(engine, args)
        else:
            engine.compose_config(args.config_name, args.overrides, RunMode.RUN)  # refuses; show_info exits
            engine.show_info(args.info, args.config_name, args.overrides)
            logging.getLogger().handlers.clear()
    return 0


def show_help(args: Namespace) -> int:
    """Prints soup's help: commands, groups with the choices on the search path, examples, flags."""
    with hydra(args) as engine:
        loader = engine.config_loader
        defaults = loader.compute_defaults_list(args.config_name, [], RunMode.RUN)
        chosen = defaults.overrides.known_choices
        groups = {}
        for group in chosen:
            if not group.startswith("hydra"):
                options = loader.get_group_options(group)
                default = chosen[group] or "(none)"
                groups[group] = [default, *(option for option in options if option != default)]
    shown = [f"{name:9}{command.says}" for name, command in COMMANDS.items() if name not in TOGETHER.split()]
    shown.append(f"{TOGETHER} [SWEEP]")
    choices = [f"{group:12}{shorten(' '.join(groups[group]), 65)}" for group in reversed(groups)]
    sys.stdout.write(HELP.format(commands=_packed(shown), groups=_packed(choices)))
    return 0


def _packed(cells: list[str]) -> str:
    """Two in a line of 80 columns where they fit, so that all of the help fits 24 lines."""
    lines = []
    left = list(cells)
    while left:
        first = left.pop(0)
        column = max(38, len(first) + 2)
        beside = next((cell for cell in left if column + len(cell) <= 77), None)
        if beside is not None:
            left.remove(beside)
        lines.append(f"  {first:{column}}{beside or ''}".rstrip())
    return "\n".join(lines)


def _show_cfg(engine: Hydra, args: Namespace) -> None:
    cfg = engine.compose_config(args.config_name, args.overrides, RunMode.RUN)
    HydraConfig.instance().set_config(cfg)
    OmegaConf.set_readonly(cfg.hydra, None)
    shown = engine.get_sanitized_cfg(cfg, args.cfg)
    if args.package and args.package != "_global_":
        shown = OmegaConf.select(shown, args.package)
        if shown is None:
            why = "no such section"
            raise Refused(Problem(key="--package", value=args.package, why=why, fix="a key of `--cfg job`"))
        if not isinstance(shown, Container):
            print(shown)
            return
        print(f"# @package {args.package}")
    if args.resolve:
        try:
            OmegaConf.resolve(shown)
        except OmegaConfBaseException as error:
            found = [problem for key in shown for problem in unresolved(shown, key, str(key))]
            raise Refused(problem for problem in found if problem.value != "???") from error
    sys.stdout.write(OmegaConf.to_yaml(shown))
