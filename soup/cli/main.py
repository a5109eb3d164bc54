"""`soup`: reads the command line and calls one function per command; a refusal ends with status 2."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

from soup.errors import Problem, RecordError, Refused


@dataclass(frozen=True)
class Command:
    """`target` is "module:function", imported when called."""

    target: str
    says: str
    composes: bool = True  # its function takes (points, args), otherwise (words, args)
    json: bool = False


COMMANDS = {
    "run": Command("soup.cli.run:run", "train; may be left out"),
    "plan": Command("soup.cli.plan:plan", "memory, steps, disk", json=True),
    "prove": Command("soup.cli.prove:prove", "what is really in force", json=True),
    "data": Command("soup.cli.data:data", "the rows as a model sees them"),
    "why": Command("soup.cli.why:why", "rules on this combination"),
    "doctor": Command("soup.cli.doctor:doctor", "what works here, what mends it", json=True),
    "runs": Command("soup.cli.runs:runs", "show compare resume export push", composes=False, json=True),
    "status": Command(
        "soup.cli.status:status", "[SWEEP] [--watch]: where a sweep stands", composes=False, json=True
    ),
    "report": Command(
        "soup.cli.report:report",
        "[RUN|SWEEP] on one page",
        composes=False,
    ),
    "logs": Command("soup.cli.logs:logs", "[-f] [SWEEP] [POINT]: what its runs say", composes=False),
    "cancel": Command("soup.cli.sweeps:cancel", "[SWEEP]: its runs save and stop", composes=False),
    "retry": Command("soup.cli.sweeps:retry", "[SWEEP]: run what is not finished", composes=False),
    "chat": Command("soup.cli.talk:chat", "[RUN] [--base]", composes=False),
    "generate": Command("soup.cli.talk:generate", "[RUN] --prompts FILE", composes=False),
    "recipes": Command("soup.cli.recipes:recipes", "[SEARCH] to start from", composes=False, json=True),
    "import": Command(
        "soup.cli.importing:import_",
        "FILE of another tool",
        composes=False,
        json=True,
    ),
    "schema": Command("soup.cli.json_schema:print_schema", "for an editor", composes=False),
}

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def console() -> NoReturn:
    """Entry point of the console script and of `python -m soup`."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status: 0 done, 1 failed, 2 refused, 130 interrupted."""
    try:
        status = _main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # a closed pipe shows here, not while Python shuts down
        return status
    except Refused as refused:
        print(_message(refused), file=sys.stderr)
        return 2
    except RecordError as error:
        print(f"soup: {error}: {error.__cause__}", file=sys.stderr)
        return 1
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "soup":
            raise
        missing = isinstance(error, ModuleNotFoundError)
        fix = (
            "pip install soup-launcher"
            if missing
            else "`soup doctor` says which package is broken, and what mends it"
        )
        print(_message(Refused(Problem(key="environment", why=str(error), fix=fix))), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a process that SIGPIPE ended


def _main(argv: Sequence[str]) -> int:
    args = parse(argv)
    if args.version:
        from importlib.metadata import version

        import soup

        print(f"soup {soup.__version__} (Hydra {version('hydra-core')})")
        return 0
    if args.help:
        from soup.cli.show import show_help

        return show_help(args)
    if args.shell_completion:
        from soup.cli.complete import complete

        return complete(args)
    if args.cfg or args.info or args.hydra_help:
        from soup.cli.show import show

        return show(args)
    command = COMMANDS[args.command]
    module, _, name = command.target.partition(":")
    if not command.composes:
        return getattr(import_module(module), name)(args.words, args)

    from soup.cli.compose import drive

    # The command is imported once its points are composed, so that a refusal stays quick.
    return drive(args, lambda points: getattr(import_module(module), name)(points, args))


def parse(argv: Sequence[str]) -> Namespace:
    """Sorts a command line into `command`, `overrides` and flags.

    A command that does not compose gets `words`, and `run_root`: the `run.root=` given, else the default.

    Raises:
        Refused: a flag, word or combination that makes no sense, all of those found.
    """
    args = Parser().parse_intermixed_args(_separate_info(argv))
    args.argv = list(argv)
    if args.config_name is None:
        args.config_name = "config"
    plain = [word for word in args.overrides if "=" not in word and not word.startswith("~")]
    # Hydra's users write +experiment=NAME; our defaults list names the group, where Hydra refuses the +.
    args.overrides = [
        word.removeprefix("+") if word.startswith("+experiment=") else word
        for word in args.overrides
        if word not in plain
    ]
    if args.shell_completion:  # whose words are install=bash and the like
        return args
    args.command = plain.pop(0) if plain and plain[0] in COMMANDS else "run"
    command = COMMANDS[args.command]
    args.words, args.run_root = [], None
    problems = list(_misused_flags(args, command))
    if command.composes:
        problems += [_unknown_word(word, args.command) for word in plain]
    else:
        args.words = plain
        problems += _take_run_root(args)
    if problems:
        raise Refused(problems)
    return args


class Parser(ArgumentParser):
    """Hydra's flags and soup's."""

    def __init__(self) -> None:
        from hydra._internal.utils import get_args_parser

        super().__init__(parents=[get_args_parser()], add_help=False, conflict_handler="resolve")
        self.add_argument("--version", action="store_true")
        self.add_argument("--json", action="store_true")
        self.add_argument("--merged", action="store_true")
        self.add_argument("--quantized", action="store_true")
        self.add_argument("--watch", action="store_true")
        self.add_argument("--follow", "-f", action="store_true")
        self.add_argument("--base", action="store_true")
        self.add_argument("--prompts")
        self.add_argument("--max-tokens", type=int)
        self.add_argument("--temperature", type=float)
        self.add_argument("--out")
        self.add_argument("--from", dest="from_tool", choices=("soup-cli", "llamafactory", "axolotl", "trl"))
        self.add_argument("--task", choices=("sft", "dpo", "kto", "orpo", "grpo", "reward"))
        self.add_argument("--deepspeed", choices=("zero2", "zero3", "zero2_offload"))
        self.add_argument("--fsdp", choices=("full_shard", "shard_grad", "full_offload"))

    def error(self, message: str) -> NoReturn:
        raise Refused(Problem(key="command line", why=message, fix="`soup --help` lists commands and flags"))


def _separate_info(argv: Sequence[str]) -> list[str]:
    """`--info task=dpo` means `--info all task=dpo`; argparse would take the override for its value."""
    words = list(argv)
    for place, word in enumerate(words):
        bare = place + 1 == len(words) or words[place + 1] not in INFO
        if word in ("--info", "-i") and bare:
            words[place] = "--info=all"
    return words


def _misused_flags(args: Namespace, command: Command) -> list[Problem]:
    problems = []
    if args.multirun and not command.composes:
        why = f"`{args.command}` composes nothing"
        problems.append(Problem(key="--multirun", why=why, fix="drop it"))
    modes = {"--run": args.run, "--multirun": args.multirun, "--cfg": args.cfg, "--info": args.info}
    given = [flag for flag, value in modes.items() if value]
    if len(given) > 1:
        fix = "give one of them; `soup plan --multirun ...` shows every point of a sweep"
        problems.append(Problem(key=" ".join(given), why="exclude each other", fix=fix))
    for flag, value in (("--resolve", args.resolve), ("--package", args.package)):
        if value and not args.cfg:
            problems.append(Problem(key=flag, why="is for --cfg only", fix=f"add --cfg job, or drop {flag}"))
    if args.json and (args.cfg or args.info or args.help or not command.json):
        takers = ", ".join(name for name, one in COMMANDS.items() if one.json)
        fix = f"drop it; these take --json: {takers}"
        problems.append(Problem(key="--json", why=f"`{args.command}` prints no JSON", fix=fix))
    for flag, commands, use in (
        ("merged", ("runs",), "runs export"),
        ("quantized", ("runs",), "runs export"),
        ("watch", ("status",), ""),
        ("follow", ("logs",), ""),
        ("base", ("chat", "generate"), ""),
        ("max_tokens", ("chat", "generate"), ""),
        ("temperature", ("chat", "generate"), ""),
        ("prompts", ("generate",), ""),
        ("out", ("import", "report", "generate"), ""),
        ("from_tool", ("import",), ""),
        ("task", ("import",), ""),
        ("deepspeed", ("import",), ""),
        ("fsdp", ("import",), ""),
    ):
        if getattr(args, flag) not in (None, False) and args.command not in commands:
            why = f"is for `{use or '` and `'.join(commands)}` only"
            name = flag.removesuffix("_tool").replace("_", "-")
            problems.append(Problem(key=f"--{name}", why=why, fix="drop it"))
    for flag, least, bound in (("max_tokens", 1, "at least 1"), ("temperature", 0.0, "at least 0")):
        value = getattr(args, flag)
        if value is not None and not value >= least:
            name = flag.replace("_", "-")
            problems.append(
                Problem(key=f"--{name}", value=value, why=f"must be {bound}", fix=f"--{name} {least:g}")
            )
    if args.experimental_rerun:
        fix = "`soup runs resume ID` continues a run from its folder"
        problems.append(Problem(key="--experimental-rerun", why="soup keeps no pickles", fix=fix))
    return problems


def _unknown_word(word: str, command: str) -> Problem:
    if word in COMMANDS:
        return Problem(key=word, why=f"a second command, beside {command}", fix="give one command at a time")
    close = get_close_matches(word, COMMANDS)
    listed = f"did you mean {' or '.join(close)}?" if close else f"commands: {', '.join(COMMANDS)}"
    why = "neither a command nor key=value"
    return Problem(key=word or "''", why=why, fix=f"{listed}; a value with spaces needs quotes")


def _take_run_root(args: Namespace) -> list[Problem]:
    problems = []
    for override in args.overrides:
        key, _, value = override.partition("=")
        if key == "run.root" and value:
            args.run_root = value
        else:
            why = f"`{args.command}` takes no override but run.root=FOLDER"
            problems.append(Problem(key=override, why=why, fix="drop it"))
    if args.run_root is None:
        from omegaconf import OmegaConf

        from soup.cli.loader import conf_dir

        args.run_root = OmegaConf.load(conf_dir() / "config.yaml").run.root
    return problems


def _message(refused: Refused) -> str:
    count = len(refused.problems)
    return f"soup refuses: {refused}" if count == 1 else f"soup refuses, for {count} reasons:\n{refused}"
