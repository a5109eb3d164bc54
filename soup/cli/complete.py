"""`--shell-completion`: commands, groups, choices and keys, the last three by Hydra's own plugins."""

from __future__ import annotations

import os
import re
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import HydraException

from soup.cli.loader import hydra
from soup.cli.main import COMMANDS, Parser
from soup.cli.shells import SCRIPTS, script
from soup.errors import Problem, Refused

VERBS = ("install", "uninstall", "query")


def complete(args: Namespace) -> int:
    """Prints a script to install or uninstall completion, or candidates for the line in `COMP_LINE`.

    Raises:
        Refused: not one of `install=SHELL`, `uninstall=SHELL`, `query=SHELL`, or no such shell.
    """
    words = dict(word.partition("=")[::2] for word in args.overrides)
    verb = next((verb for verb in VERBS if verb in words), None)
    if verb is None or len(words) != 1 or (verb == "query" and "COMP_LINE" not in os.environ):
        fix = 'in bash: eval "$(soup --shell-completion install=bash)"'
        raise Refused(
            Problem(key="--shell-completion", why="takes install=SHELL or uninstall=SHELL", fix=fix)
        )
    if verb == "query":
        return _query(words[verb])
    if words[verb] not in SCRIPTS:
        raise Refused(
            Problem(key=verb, value=words[verb], why="no such shell", fix=f"one of: {', '.join(SCRIPTS)}")
        )
    as_module = sys.argv[0].endswith("__main__.py")
    print(script(verb, words[verb], "python python3" if as_module else "soup"))
    return 0


def _query(shell: str) -> int:
    """Hands Hydra's plugin the overrides of the line alone, in the one order that it understands."""
    line = re.sub(r"^\s*(\S*python\S*\s+-m\s+soup|\S+)\s*", "", os.environ["COMP_LINE"])
    words = line.split()
    last = words.pop() if words and not line.endswith(" ") else ""
    try:
        args = Parser().parse_intermixed_args(words)
        args.config_name = args.config_name or "config"
        command = next((word for word in args.overrides if word in COMMANDS), None)
        if command is None:
            print("\n".join(name for name in COMMANDS if name.startswith(last)))
        elif not COMMANDS[command].composes:  # takes runs and files, which the shell itself completes
            actions = COMMANDS["runs"].says.split() if args.overrides == ["runs"] else []
            offered = [name for name in [*actions, "run.root="] if name.startswith(last)]
            print("\n".join(_files(last) if "=" in last else offered))
            return 0
        overrides = [word for word in args.overrides if "=" in word or word.startswith("~")]
        os.environ["COMP_LINE"] = " ".join(["soup", *overrides, last])
        with hydra(args) as engine:
            # Hydra's plugins offer what they can when its own exceptions say that a line does not compose.
            engine.config_loader = ConfigLoaderImpl(engine.config_loader.config_search_path)
            with redirect_stdout(StringIO()) as said:
                engine.shell_completion(args.config_name, [f"query={shell}"])
            # Hydra has files only after ./ and /, and marks no folder.
            offered = "" if re.search("=[./]", last) else said.getvalue().strip()
            print(offered or "\n".join(_files(last)))
    except (Refused, HydraException):  # a line that cannot be read has no candidates
        pass
    return 0


def _files(word: str) -> list[str]:
    """`data.train=ro` with each file that its value, or the last of its list, begins; none whose name needs quotes."""
    split = re.fullmatch(r"([^=]+=(?:.*[\[,])?)([^\[,]*)", word)
    if split is None:
        return []
    before, typed = split.groups()
    folder, _, start = typed.rpartition("/")
    above = typed.removesuffix(start)
    try:
        there = sorted(Path(folder or above or ".").expanduser().iterdir())
    except OSError:
        return []
    return [
        f"{before}{above}{one.name}{'/' * one.is_dir()}"
        for one in there
        if one.name.startswith(start)
        and (start or one.name[0] != ".")
        and re.fullmatch(r"[\w.@+-]+", one.name)
    ]
