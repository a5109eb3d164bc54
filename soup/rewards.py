"""`task.rewards`: what GRPO is rewarded for. Built-in ones by name, the user's own as `path/to/file.py:function`.

A reward has TRL's signature: `f(prompts, completions, **columns)` gives one number for each completion, or None
where it does not apply. Everything that can be wrong with a name or a file is found before a model loads.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import inspect
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from soup.errors import Problem, Refused

KEY = "task.rewards"
Reward = Callable[..., list[float | None]]
Score = Callable[
    [str, Any], float | None
]  # of one completion's text, and the column that it is compared with
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")  # by TRL
WITHHELD = ("prompt", "completion")  # columns that TRL gives as prompts and completions only
FLOAT32_MAX = 3.4028234663852886e38  # TRL keeps rewards in float32
NUMBER = re.compile(
    r"(?:(?<![\w.)])(?P<minus>[-\u2212])\$?)?(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?P<exponent>[eE][-+]?\d{1,3}(?!\d))?"
)
MARKED = re.compile(
    r"^[ \t]*####[ \t]*([-\u2212$\d.,]+)[ \t]*$|\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", re.MULTILINE
)


class RewardError(Exception):
    """A reward that raised, or returned something that is no list of finite numbers; names reward and sample."""


def load(rewards: Sequence[str]) -> list[Reward]:
    """The functions behind the names, each checked at every call; `__name__` is the name as it was given.

    Raises:
        Refused: with a problem for each name that cannot be used.
    """
    loaded, problems = [], []
    for word in sorted({word for word in rewards if rewards.count(word) > 1}):
        why = f"{word} is there {rewards.count(word)} times, and TRL logs rewards by their names"
        fix = "each reward once; task.reward_weights makes one count for more"
        problems.append(Problem(key=KEY, value=word, why=why, fix=fix))
    for word in dict.fromkeys(rewards):
        try:
            loaded.append(_checked(word, _built_in(word) if own_file(word) is None else _own(word)))
        except Refused as refused:
            problems.extend(refused.problems)
    if problems:
        raise Refused(problems)
    return loaded


def columns(rewards: Sequence[str]) -> dict[str, str]:
    """Columns of the data that rewards cannot do without, and the first reward that needs each.

    Raises:
        Refused: a file that cannot be used.
    """
    needed: dict[str, str] = {}
    for word in rewards:
        name, _, argument = word.partition(":")
        if own_file(word) is not None:
            named = [column for column in _required(_own(word)) if column not in GIVEN]
        else:
            named = [argument or "answer"] if name in COMPARING else []
        for column in named:
            needed.setdefault(column, word)
    return needed


def unanswered(rewards: Sequence[str], column: Callable[[str], Iterable[Any]]) -> list[Problem]:
    """What keeps built-in rewards from comparing with the data; `column` gives the values of one by its name."""
    problems = []
    for word in rewards:
        name, _, argument = word.partition(":")
        if name not in COMPARING:
            continue
        compared = argument or "answer"
        answers, why = [one for one in column(compared) if one is not None], None
        try:
            for answer in answers:
                COMPARING[name]("", answer)
        except ValueError as error:
            why = f"{error} of a row"
        if not answers:
            why = f"`{compared}` is null in every row, so it would reward nothing"
        if why is not None:
            fix = f"data whose `{compared}` it can compare with, null where it does not apply"
            problems.append(Problem(key=KEY, value=word, why=why, fix=fix))
    return problems


def files(rewards: Sequence[str]) -> list[Path]:
    """The local files named, each once: their content is part of what a run is."""
    return list(dict.fromkeys(path for word in rewards if (path := own_file(word)) is not None))


def _exact_match(text: str, answer: Any) -> float:
    return float(text.strip() == str(answer).strip())


def _numeric(text: str, answer: Any) -> float:
    """Whether the number that is the answer (a line `#### 42`, `\\boxed{42}`, or else the last) is the same."""
    wanted = _number(str(answer))
    if wanted is None:
        raise ValueError(f"there is no number in the answer {str(answer)[:60]!r}")
    return float(_number(text) == wanted)


def _number(text: str) -> Decimal | None:
    marks = MARKED.findall(text)
    found = list(NUMBER.finditer("".join(marks[-1]) if marks else text))
    if not found:
        return None
    minus, digits, exponent = found[-1].group("minus", "digits", "exponent")
    return Decimal(("-" if minus else "") + digits.replace(",", "") + (exponent or ""))


def _regex(pattern: str) -> Score:
    compiled = re.compile(pattern)
    return lambda text, _: float(compiled.search(text) is not None)


def _length(words: str) -> Score:
    """1 at that many words, falling to 0 at none and at twice as many."""
    target = int(words) if re.fullmatch(r"[0-9]{1,9}", words) else 0
    if target < 1:
        raise ValueError("it must be a number of words, at least 1")
    return lambda text, _: max(0.0, 1 - abs(len(text.split()) - target) / target)


def _json(_: str) -> Score:
    """Whether it is JSON, in a fence of backticks or not."""

    def score(text: str, _: Any) -> float:
        fenced = re.fullmatch(r"\s*```(?:json)?\s(.*)```\s*", text, re.DOTALL)
        try:
            json.loads(fenced[1] if fenced else text, parse_constant=int)  # int refuses NaN and Infinity
        except (ValueError, RecursionError):
            return 0.0
        return 1.0

    return score


def _tags(names: str) -> Score:
    """Whether each tag opens and closes once, one after the other, in this order."""
    tags = [name.strip() for name in names.split(",")]
    if not all(re.fullmatch(r"[\w-]+", tag) for tag in tags):
        raise ValueError("tags are names with commas between them")
    wanted = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    marks = re.compile("|".join(wanted))
    return lambda text, _: float(marks.findall(text) == wanted)


COMPARING: Mapping[str, Score] = {"exact_match": _exact_match, "numeric": _numeric}  # argument: the column
# The others are made from their argument; a default of None must be given, of "" takes none.
MADE: Mapping[str, tuple[Callable[[str], Score], str | None]] = {
    "regex": (_regex, None),
    "length": (_length, "20"),
    "json": (_json, ""),
    "tags": (_tags, "think,answer"),
}


def own_file(word: str) -> Path | None:
    """The file of `path/to/file.py:function`, also where the function is left out."""
    path = word if word.endswith(".py") else word.rpartition(":")[0]
    built_in = word.partition(":")[0] in {*COMPARING, *MADE}
    return Path(path).expanduser() if path.endswith(".py") and not built_in else None


def _refusal(word: str, why: str, fix: str) -> Refused:
    return Refused(Problem(key=KEY, value=word, why=why, fix=fix))


def _built_in(word: str) -> Reward:
    name, colon, argument = word.partition(":")
    if name not in COMPARING and name not in MADE:
        near = difflib.get_close_matches(name, [*COMPARING, *MADE], n=1)
        known = ", ".join([*COMPARING, *MADE])
        fix = f"did you mean {near[0]}?" if near else f"one of {known}, or path/to/file.py:function"
        raise _refusal(word, "there is no such reward", fix)
    make, default = MADE.get(name, (None, "answer"))
    example = f"{name}:{'PATTERN' if default is None else default}"
    if colon and default == "":
        raise _refusal(word, f"{name} takes no argument", name)
    if not argument and (colon or default is None):
        raise _refusal(word, f"{name} needs an argument{' after the colon' if colon else ''}", example)
    if make is None:
        if argument in {*GIVEN, *WITHHELD}:
            raise _refusal(word, f"TRL gives rewards no column `{argument}`", f"{name}:COLUMN, another one")
        return _scoring(COMPARING[name], argument or "answer")
    try:
        return _scoring(make(argument or default or ""), None)
    except (ValueError, OverflowError, re.error) as error:
        raise _refusal(word, f"its argument cannot be used: {error}", example) from error


def _scoring(score: Score, column: str | None) -> Reward:
    def reward(completions: Sequence[Any], **given: Any) -> list[float | None]:
        if column is None:
            return [score(_text(one), None) for one in completions]
        pairs = zip(completions, given[column], strict=True)
        return [None if other is None else score(_text(one), other) for one, other in pairs]

    return reward


def _text(said: Any) -> str:
    """What was said, of a text or of messages."""
    return said if isinstance(said, str) else "".join(str(turn.get("content") or "") for turn in said)


def _own(word: str) -> Callable[..., Any]:
    path, name = own_file(word), "" if word.endswith(".py") else word.rpartition(":")[2]
    if not name:
        raise _refusal(word, "names no function", "path/to/file.py:function")
    module = _module(word, path.absolute())
    function = getattr(module, name, None)
    if function is None:
        raise _refusal(word, f"{path} has no {name}", "the name of a function in that file")
    shape = f"def {name}(prompts, completions, **columns): ..."
    if not callable(function) or isinstance(function, type):
        raise _refusal(word, f"{name} is no function", shape)
    if any(map(inspect.iscoroutinefunction, (function, type(function).__call__))):
        why = "is asynchronous: what it returns cannot be checked before TRL gathers it"
        raise _refusal(word, why, f"a plain function, {shape}")
    try:
        given = [*GIVEN, "any_other_column", *(one for one in _required(function) if one not in WITHHELD)]
        inspect.signature(function).bind(**dict.fromkeys(given))
    except (TypeError, ValueError) as error:
        why = f"cannot be called as TRL calls rewards, with {', '.join(GIVEN)} and every column: {error}"
        raise _refusal(word, why, shape) from error
    return function


def _required(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [one.name for one in parameters if one.default is one.empty and one.kind in by_name]


def _module(word: str, path: Path) -> ModuleType:
    """The file as a module, run once for each content; no bytecode is left beside it, or read from there."""
    try:
        source = path.read_bytes()
    except OSError as error:
        why = f"{path} cannot be read: {error.strerror}"
        raise _refusal(word, why, "path/to/file.py:function, from the working folder") from error
    name = f"soup_reward_{hashlib.sha256(bytes(path) + source).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    module = sys.modules[name] = ModuleType(name)  # dataclasses look their module up
    module.__file__ = str(path)
    try:
        exec(compile(source, path, "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines.append(error.lineno)
        why = f"{path}:{lines[-1] if lines else ''} cannot be imported: {_brief(error)}"
        raise _refusal(word, why, "a file that Python can import") from error
    return module


def _brief(error: BaseException) -> str:
    told = str(error.msg if isinstance(error, SyntaxError) else error).strip().split("\n")[0]
    return f"{type(error).__name__}: {told[:200]}" if told else type(error).__name__


def _checked(word: str, function: Callable[..., Any]) -> Reward:
    """The function, with every call's outcome looked at."""

    @functools.wraps(function)
    def reward(prompts: Sequence[Any], completions: Sequence[Any], **given: Any) -> list[float | None]:
        def sample(place: int) -> str:
            asked = prompts[place] if isinstance(prompts[place], str) else prompts[place][-1:]
            return f"sample {place} ({_text(asked)[:60]!r}, answered {_text(completions[place])[:60]!r})"

        try:
            values = function(prompts=prompts, completions=completions, **given)
        except Exception as error:
            place = _culprit(error, function, {"prompts": prompts, "completions": completions, **given})
            told = f"this batch of {len(completions)}" if place is None else sample(place)
            raise RewardError(f"the reward {word} raised {_brief(error)}, on {told}") from error
        values = values.tolist() if hasattr(values, "tolist") else values
        listed = isinstance(values, Sequence) and not isinstance(values, str | bytes)
        if not listed or len(values) != len(completions):
            size = f" of {len(values)}" if hasattr(values, "__len__") else ""
            told = f"a {type(values).__name__}{size}, and not a list of {len(completions)} numbers"
            raise RewardError(f"the reward {word} returned {told}; the first is {sample(0)}")
        for place, value in enumerate(values):
            if value is not None and not (isinstance(value, Real) and abs(value) <= FLOAT32_MAX):
                told = f"{repr(value)[:60]} to {sample(place)}"
                raise RewardError(f"the reward {word} gave {told}, which is no finite number")
        return [None if value is None else float(value) for value in values]

    reward.__name__ = word
    return reward


def _culprit(error: Exception, function: Callable[..., Any], call: Mapping[str, Any]) -> int | None:
    """The first sample that fails in the same way when it stands alone."""
    size = len(call["completions"])
    split = {name for name, value in call.items() if isinstance(value, list) and len(value) == size}
    for place in range(size):
        try:
            function(**{name: [value[place]] if name in split else value for name, value in call.items()})
        except Exception as again:
            if type(again) is type(error):
                return place
    return None
