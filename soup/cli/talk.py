"""`soup chat RUN [--base]` and `soup generate RUN --prompts FILE [--out FILE] [--base]`."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from contextlib import closing
from pathlib import Path
from typing import Any

from soup.cli.quiet import libraries_quiet
from soup.errors import Problem, Refused
from soup.record import Run, find

MAX_TOKENS = 256  # of an answer
HELP = "/new starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer"


@libraries_quiet()
def chat(words: list[str], args: Namespace) -> int:
    """Answers what is typed, keeping the conversation; with `--base` the base model answers in one of its own."""
    speaker = _speaker(_run(words, args), args)
    names = ("base", "tuned") if args.base else ("",)
    talks: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    terminal = sys.stdin.isatty()
    if terminal:
        print(HELP)
    while True:
        if terminal:
            print("\n> ", end="", flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            print()
            raise
        said = line.strip()
        if not line and terminal:
            print()  # or the shell's prompt comes behind this one
        if not line or said == "/quit":
            return 0
        if said == "/new":
            talks = {name: [] for name in names}
        elif said:
            for name, talk in talks.items():
                talk.append({"role": "user", "content": said})
                print(f"{name}: " if name else "", end="", flush=True)
                answer = _answer(speaker, talk, name == "base", terminal)
                if answer:
                    talk.append({"role": "assistant", "content": answer.strip()})
                else:  # stopped before it said anything
                    talk.pop()


def _answer(speaker: Any, talk: list[dict[str, Any]], base: bool, terminal: bool) -> str:
    """Prints the answer as it comes; on a terminal Ctrl-C cuts it short, a second one ends the command."""
    answer = ""
    try:
        with closing(speaker.stream(talk, base=base)) as pieces:
            for piece in pieces:
                answer += piece
                print(piece, end="", flush=True)
    except KeyboardInterrupt as stop:
        if not terminal or isinstance(stop.__context__, KeyboardInterrupt):
            print()
            raise
    print(flush=True)
    return answer


@libraries_quiet()
def generate(words: list[str], args: Namespace) -> int:
    """A line of JSON for each prompt, with `completion`, and with `--base` the base model's too."""
    run = _run(words, args)
    if args.prompts is None:
        raise Refused(
            Problem(key="generate", why="needs prompts", fix=f"soup generate {run.id} --prompts FILE.jsonl")
        )
    prompts = _read(Path(args.prompts))
    speaker = _speaker(run, args)
    out = sys.stdout if args.out is None else _opened(args.out)
    try:
        bases = speaker.answers(prompts, base=True) if args.base else [None] * len(prompts)
        for prompt, base, answer in zip(prompts, bases, speaker.answers(prompts), strict=True):
            line = {"prompt": prompt, "completion": answer} | ({} if base is None else {"base": base})
            print(json.dumps(line, ensure_ascii=False), file=out, flush=True)
    finally:
        if args.out is not None:
            out.close()
    if args.out is not None:
        print(f"{len(prompts)} answers of run {run.id} in {args.out}")
    return 0


def _run(words: list[str], args: Namespace) -> Run:
    if len(words) > 1:
        why = "takes one run"
        raise Refused(
            Problem(key=args.command, value=" ".join(words), why=why, fix=f"soup {args.command} {words[0]}")
        )
    found = find(Path(args.run_root), words or ["latest"])
    return found[0]


def _speaker(run: Run, args: Namespace) -> Any:
    from soup.model.talk import Speaker

    tokens = MAX_TOKENS if args.max_tokens is None else args.max_tokens
    return Speaker(run, base=args.base, max_tokens=tokens, temperature=args.temperature or 0.0)


def _opened(name: str) -> Any:
    try:
        return open(name, "w", encoding="utf-8")
    except OSError as error:
        why = f"cannot be written: {error.strerror}"
        raise Refused(Problem(key="--out", value=name, why=why, fix="--out FILE.jsonl")) from error


def _read(path: Path) -> list[Any]:
    """Prompts: a text file has one in each line; JSONL has `prompt`, or `messages` up to where the answer begins.

    Raises:
        Refused: no such file, or lines that are no prompt; all of them.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise Refused(
            Problem(key="--prompts", value=str(path), why=why, fix="a .jsonl or .txt file")
        ) from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise Refused(
            Problem(key="--prompts", value=str(path), why="has no line", fix="one prompt in each line")
        )
    if path.suffix not in (".jsonl", ".json"):
        return [line for _, line in lines]
    prompts: list[Any] = []
    problems = []
    for number, line in lines:
        prompt = _prompt(line)
        if prompt is None:
            why = "is no prompt"
            fix = '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
            problems.append(Problem(key=f"{path}:{number}", why=why, fix=fix))
        prompts.append(prompt)
    if problems:
        raise Refused(problems)
    return prompts


def _prompt(line: str) -> Any:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    found = row.get("prompt", row.get("messages")) if isinstance(row, dict) else row
    if isinstance(found, str):
        return found if found.strip() else None
    if not isinstance(found, list) or not found:
        return None
    whole = all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in found
    )
    return found if whole else None
