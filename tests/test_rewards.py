"""Rewards: what each gives, what is refused before a model loads, and errors that name the sample."""

from __future__ import annotations

import pytest

from soup import rewards
from soup.errors import Refused

ASKED = [{"role": "user", "content": "What is six times seven?"}]


def said(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("word", "text", "wanted"),
    [
        ("exact_match", " 42 ", 1.0),
        ("exact_match", "It is 42", 0.0),
        ("exact_match:other", "forty-two", 1.0),
        ("numeric", "6 x 7 = 42.0", 1.0),
        ("numeric", "#### 42", 1.0),
        ("numeric", r"so \boxed{42}.", 1.0),
        ("numeric", "42 or 43", 0.0),
        ("numeric", "no idea", 0.0),
        ("regex:^It is \\d+$", "It is 42", 1.0),
        ("regex:^It is \\d+$", "It is not", 0.0),
        ("length:4", "one two three four", 1.0),
        ("length:4", "one two", 0.5),
        ("length:4", "a b c d e f g h i j", 0.0),
        ("length", " ".join("word" for _ in range(20)), 1.0),
        ("json", '{"a": [1]}', 1.0),
        ("json", '```json\n{"a": 1}\n```', 1.0),
        ("json", "{'a': 1}", 0.0),
        ("tags", "<think>6x7</think>\n<answer>42</answer>", 1.0),
        ("tags", "<answer>42</answer><think>6x7</think>", 0.0),
        ("tags", "<think>a</think><think>b</think><answer>42</answer>", 0.0),
        ("tags:sum", "well <sum>42</sum>", 1.0),
        ("tags:sum", "well <sum>42", 0.0),
    ],
)
def test_built_in(word, text, wanted):
    (reward,) = rewards.load([word])
    assert reward.__name__ == word
    given = {"answer": ["42"], "other": ["forty-two"], "trainer_state": None}
    assert reward(prompts=[ASKED], completions=[said(text)], **given) == [pytest.approx(wanted)]
    assert reward(prompts=["six times seven"], completions=[text], **given) == [pytest.approx(wanted)]


def test_numbers_as_people_write_them():
    (reward,) = rewards.load(["numeric"])
    answers = ["1,234.5", "-3", "0.5", "1000000"]
    told = ["about 1234.50", "it is -3.", ".5", "1,000,000 in all"]
    assert reward(prompts=["a"] * 4, completions=told, answer=answers) == [1.0] * 4


@pytest.fixture
def own(tmp_path):
    def written(source, name="reward"):
        (tmp_path / "mine.py").write_text(source)
        return f"{tmp_path}/mine.py:{name}"

    return written


def test_own_rewards_see_the_columns(own):
    (reward,) = rewards.load([own("def reward(prompts, completions, level, **_):\n    return level\n")])
    assert reward(prompts=["a", "b"], completions=["c", "d"], level=[1, None], trainer_state=0) == [1, None]


def test_columns_and_files(own, tmp_path):
    word = own("def reward(prompts, completions, level, hint=None, **_): ...\n")
    words = ["numeric", "exact_match:solution", "length", word]
    assert rewards.columns(words) == {"answer": "numeric", "solution": "exact_match:solution", "level": word}
    assert rewards.files(words) == [tmp_path / "mine.py"]


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("lenght", "no such reward"),
        ("nothing_like_it", "no such reward"),
        ("regex", "needs an argument"),
        ("regex:(", "cannot be used"),
        ("length:many", "cannot be used"),
        ("length:0", "at least 1"),
        ("json:yes", "takes no argument"),
        ("tags:<think>", "names with commas"),
        ("nowhere/mine.py:reward", "there is no file"),
    ],
)
def test_refused(word, why):
    with pytest.raises(Refused, match=why) as refused:
        rewards.load([word])
    (problem,) = refused.value.problems
    assert problem.key == "task.rewards" and problem.value == word and problem.fix


def test_a_near_name_is_suggested_and_problems_come_together():
    with pytest.raises(Refused) as refused:
        rewards.load(["lenght", "json", "regex:("])
    assert [problem.value for problem in refused.value.problems] == ["lenght", "regex:("]
    assert refused.value.problems[0].fix == "did you mean length?"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("def reward(:\n", ":1 cannot be imported: SyntaxError"),
        ("\nimport nothing_of_this_name\n", ":2 cannot be imported: ModuleNotFoundError"),
        ("def other(**_): ...\n", "has no reward"),
        ("reward = 3\n", "is no function"),
        ("def reward(completions): ...\n", "cannot be called as TRL calls"),
        ("async def reward(**_): ...\n", "asynchronous"),
    ],
)
def test_own_files_that_cannot_be_used(own, source, why):
    with pytest.raises(Refused, match=why):
        rewards.load([own(source)])


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (
            "return [1 / len(text) for text in completions]",
            r"raised ZeroDivisionError.*sample 1 \('b', answered ''\)",
        ),
        ("raise KeyError(len(completions))", "raised KeyError.*sample 0"),
        ("return [1 / (3 - len(completions))] * 3 if len(completions) == 3 else [1]", "this batch of 3"),
        ("return [1.0]", "a list of 1, and not a list of 3"),
        ("return 1.0", "returned a float, and not a list of 3"),
        ("return None", "returned a NoneType"),
        ("return 'abc'", "returned a str of 3"),
        ("return [1.0, float('nan'), 2.0]", r"gave nan to sample 1 \('b', answered ''\)"),
        ("return [1.0, 2.0, float('-inf')]", "gave -inf to sample 2"),
        ("return [1.0, 'high', 2.0]", "gave 'high' to sample 1"),
    ],
)
def test_what_a_reward_does_wrong_names_it_and_the_sample(own, body, why):
    word = own(f"def reward(prompts, completions, **_):\n    {body}\n")
    (reward,) = rewards.load([word])
    with pytest.raises(rewards.RewardError, match=why) as error:
        reward(prompts=["a", "b", "c"], completions=["x", "", "yz"], trainer_state=None)
    assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_arrays_are_lists(own):
    word = own("import numpy\ndef reward(completions, **_):\n    return numpy.ones(len(completions))\n")
    assert rewards.load([word])[0](prompts=["a"], completions=["b"]) == [1.0]
