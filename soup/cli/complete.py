"""`--shell-completion`: commands, groups, choices and keys, the last three by Hydra's own plugins."""

from __future__ import annotations

import os
import re
import sys
from argparse import Namespace

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import HydraException

from soup.cli.loader import hydra
from soup.cli.main import COMMANDS, Parser
from soup.errors import Problem, Refused

VERBS = ("install", "uninstall", "query")

# Hydra's scripts complete a program or a script, and know no `python -m`.
MODULE_SCRIPT = """\
soup_module_completion()
{
    words=($COMP_LINE)
    if [ "${words[1]} ${words[2]}" != "-m soup" ]; then return; fi
    choices=$(COMP_LINE=$COMP_LINE "${words[0]}" -m soup -sc query=bash 2> /dev/null)
    COMPREPLY=($(compgen -o nospace -o default -W "$choices" -- "${words[$COMP_CWORD]}"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F soup_module_completion python python3
"""


def complete(args: Namespace) -> int:
    """Prints a script to install or uninstall completion, or candidates for the line in `COMP_LINE`.

    Raises:
        Refused: not one of `install=SHELL`, `uninstall=SHELL`, `query=SHELL`, or a shell Hydra does not know.
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
    with hydra(args) as engine:
        shells = engine.get_shell_to_plugin_map(engine.config_loader)
        as_module = sys.argv[0].endswith("__main__.py")
        known = [shell for shell in shells if not (as_module and shell == "fish")]
        if words[verb] not in known:
            fix = f"one of: {', '.join(known)}" + ("; `soup` has fish too" if as_module else "")
            raise Refused(Problem(key=verb, value=words[verb], why="no such shell", fix=fix))
        if as_module:
            print(MODULE_SCRIPT if verb == "install" else "complete -r python python3")
        else:
            engine.shell_completion(args.config_name, args.overrides)
    return 0


def _query(shell: str) -> int:
    """Hands Hydra's plugin the overrides of the line alone, in the one order that it understands."""
    line = re.sub(r"^\s*(\S*python\S*\s+-m\s+soup|\S+)\s*", "", os.environ["COMP_LINE"])
    words = line.split()
    last = words.pop() if words and not line.endswith(" ") else ""
    try:
        args = Parser().parse_intermixed_args(words)
        args.config_name = args.config_name or "config"
        if not any(word in COMMANDS for word in args.overrides):
            built = [name for name, command in COMMANDS.items() if command.target]
            print("\n".join(name for name in built if name.startswith(last)))
        overrides = [word for word in args.overrides if "=" in word or word.startswith("~")]
        os.environ["COMP_LINE"] = " ".join(["soup", *overrides, last])
        with hydra(args) as engine:
            # Hydra's plugins offer what they can when its own exceptions say that a line does not compose.
            engine.config_loader = ConfigLoaderImpl(engine.config_loader.config_search_path)
            engine.shell_completion(args.config_name, [f"query={shell}"])
    except (Refused, HydraException):  # a line that cannot be read has no candidates
        pass
    return 0
