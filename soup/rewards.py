"""`task.rewards`: what GRPO is rewarded for. Built-in ones by name, the user's own as `path/to/file.py:function`.

A reward has TRL's signature: `f(prompts, completions, **columns)` gives one number for each completion, or None
where it does not apply. Everything that can be wrong with a name or a file is found before a model loads.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from soup.errors import Problem, Refused

KEY = "task.rewards"
Score = Callable[[str, Any], float]  # of one completion's text, and the column that it is compared with
ANSWER = "answer"
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")  # by TRL
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*|-?\.\d+")


class RewardError(Exception):
    """A reward that raised, or returned something that is no list of finite numbers; names reward and sample."""


def load(rewards: Sequence[str]) -> list[Callable[..., list[float | None]]]:
    """The functions behind the names, each checked at every call; `__name__` is the name as it was given.

    Raises:
        Refused: with a problem for each name that cannot be used.
    """
    loaded, problems = [], []
    for word in rewards:
        try:
            loaded.append(_checked(word, _own(word) if _file(word) else _built_in(word)))
        except Refused as refused:
            problems.extend(refused.problems)
    if problems:
        raise Refused(problems)
    return loaded


def columns(rewards: Sequence[str]) -> dict[str, str]:
    """Columns of the data that rewards cannot do without, and the first reward that needs each."""
    needed: dict[str, str] = {}
    for word in rewards:
        name, _, argument = word.partition(":")
        if _file(word):
            parameters = inspect.signature(_own(word)).parameters.values()
            named = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        else:
            named = [argument or ANSWER] if name in COMPARING else []
        for column in named:
            if column not in GIVEN:
                needed.setdefault(column, word)
    return needed


def files(rewards: Sequence[str]) -> list[Path]:
    """The local files named, whose content is part of what a run is."""
    return [path for word in rewards if (path := _file(word))]


def _exact_match(text: str, answer: Any) -> float:
    return float(text.strip() == str(answer).strip())


def _numeric(text: str, answer: Any) -> float:
    """Whether the completion's last number is the answer's (`#### 42` and `\\boxed{42}` end in theirs)."""
    found, wanted = _last_number(text), _last_number(str(answer))
    return float(found is not None and wanted is not None and math.isclose(found, wanted, rel_tol=1e-9))


def _last_number(text: str) -> float | None:
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def _regex(pattern: str) -> Score:
    compiled = re.compile(pattern)
    return lambda text, _: float(compiled.search(text) is not None)


def _length(words: str) -> Score:
    """1 at that many words, falling to 0 at none and at twice as many."""
    target = int(words)
    if target < 1:
        raise ValueError("the number of words must be at least 1")
    return lambda text, _: max(0.0, 1 - abs(len(text.split()) - target) / target)


def _json(_: str) -> Score:
    """Whether it is JSON, in a fence of backticks or not."""

    def score(text: str, _: Any) -> float:
        fenced = re.fullmatch(r"\s*```(?:json)?\n(.*)\n```\s*", text, re.DOTALL)
        try:
            json.loads(fenced[1] if fenced else text)
        except ValueError:
            return 0.0
        return 1.0

    return score


def _tags(names: str) -> Score:
    """Whether each tag opens and closes once, one after the other, in this order."""
    tags = names.split(",")
    if not all(re.fullmatch(r"[\w-]+", tag) for tag in tags):
        raise ValueError("tags are names with commas between them")
    order = re.compile(".*?".join(rf"<{tag}>.*?</{tag}>" for tag in tags), re.DOTALL)

    def score(text: str, _: Any) -> float:
        once = all(text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1 for tag in tags)
        return float(once and order.search(text) is not None)

    return score


COMPARING: Mapping[str, Score] = {"exact_match": _exact_match, "numeric": _numeric}  # argument: the column
# The others are made from their argument; a default of None must be given, of "" takes none.
MADE: Mapping[str, tuple[Callable[[str], Score], str | None]] = {
    "regex": (_regex, None),
    "length": (_length, "20"),
    "json": (_json, ""),
    "tags": (_tags, "think,answer"),
}


def _file(word: str) -> Path | None:
    path, colon, _ = word.rpartition(":")
    return Path(path).expanduser() if colon and path.endswith(".py") else None


def _refusal(word: str, why: str, fix: str) -> Refused:
    return Refused(Problem(key=KEY, value=word, why=why, fix=fix))


def _built_in(word: str) -> Callable[..., list[float | None]]:
    name, colon, argument = word.partition(":")
    if name in COMPARING:
        return _scoring(COMPARING[name], argument or ANSWER)
    if name not in MADE:
        near = difflib.get_close_matches(name, [*COMPARING, *MADE], n=1)
        known = ", ".join([*COMPARING, *MADE])
        fix = f"did you mean {near[0]}?" if near else f"one of {known}, or path/to/file.py:function"
        raise _refusal(word, "there is no such reward", fix)
    make, default = MADE[name]
    if colon and default == "":
        raise _refusal(word, f"{name} takes no argument", name)
    if not argument and default is None:
        raise _refusal(word, f"{name} needs an argument", f"{name}:PATTERN")
    try:
        return _scoring(make(argument or default or ""), None)
    except (ValueError, re.error) as error:
        raise _refusal(
            word, f"its argument cannot be used: {error}", f"{name}:{default or 'PATTERN'}"
        ) from error


def _scoring(score: Score, column: str | None) -> Callable[..., list[float | None]]:
    def reward(completions: Sequence[Any], **given: Any) -> list[float | None]:
        compared = [None] * len(completions) if column is None else given[column]
        return [score(_text(one), other) for one, other in zip(completions, compared, strict=True)]

    return reward


def _text(completion: Any) -> str:
    """What was said, of a text or of messages."""
    return completion if isinstance(completion, str) else "".join(turn["content"] for turn in completion)


def _own(word: str) -> Callable[..., Any]:
    path, _, name = word.rpartition(":")
    function = getattr(_module(word, Path(path).expanduser()), name, None)
    if function is None:
        raise _refusal(word, f"{path} has no {name}", "the name of a function in that file")
    if not callable(function) or isinstance(function, type):
        raise _refusal(word, f"{name} is no function", "def reward(prompts, completions, **columns): ...")
    if inspect.iscoroutinefunction(function):
        raise _refusal(
            word, "is asynchronous, so its errors could not be traced to a sample", "a plain function"
        )
    try:
        inspect.signature(function).bind_partial(**dict.fromkeys(GIVEN))
    except TypeError as error:
        fix = f"def {name}(prompts, completions, **columns): ..."
        raise _refusal(word, f"cannot be called as TRL calls rewards: {error}", fix) from error
    return function


def _module(word: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise _refusal(word, f"there is no file {path}", "path/to/file.py:function, from the working folder")
    spec = importlib.util.spec_from_file_location(f"soup_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001
        line = next(
            (
                f":{frame.lineno}"
                for frame in reversed(inspect.getinnerframes(error.__traceback__))
                if frame.filename == str(path)
            ),
            "",
        )
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else line
        why = f"{path}{line} cannot be imported: {type(error).__name__}: {error}"
        raise _refusal(word, why, "a file that Python can import") from error
    return module


def _checked(word: str, function: Callable[..., Any]) -> Callable[..., list[float | None]]:
    """The function, with every call's outcome looked at."""

    @functools.wraps(function)
    def reward(prompts: Sequence[Any], completions: Sequence[Any], **given: Any) -> list[float | None]:
        def sample(place: int) -> str:
            asked, said = (_text(one[place])[:60] for one in (prompts, completions))
            return f"sample {place} ({asked!r}, answered {said!r})"

        try:
            values = function(prompts=prompts, completions=completions, **given)
        except Exception as error:
            where = _culprit(function, prompts, completions, given)
            told = f"this batch of {len(completions)}" if where is None else sample(where)
            raise RewardError(
                f"the reward {word} raised {type(error).__name__}: {error}, on {told}"
            ) from error
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(completions):
            size = f" of {len(values)}" if hasattr(values, "__len__") else ""
            raise RewardError(
                f"the reward {word} returned a {type(values).__name__}{size}, and not a list of {len(completions)} "
                f"numbers; the first is {sample(0)}"
            )
        for place, value in enumerate(values):
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
                raise RewardError(
                    f"the reward {word} gave {value!r} to {sample(place)}, which is no finite number"
                )
        return list(values)

    reward.__name__ = word
    return reward


def _culprit(
    function: Callable[..., Any], prompts: Sequence[Any], completions: Sequence[Any], given: Mapping[str, Any]
) -> int | None:
    """The first sample that fails when it stands alone."""
    for place in range(len(completions)):
        one = {
            name: [value[place]] if isinstance(value, list) and len(value) == len(completions) else value
            for name, value in given.items()
        }
        try:
            function(prompts=[prompts[place]], completions=[completions[place]], **one)
        except Exception:  # noqa: BLE001
            return place
    return None
