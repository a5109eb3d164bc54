"""Rewards: what each gives, what is refused before a model loads, and errors that name the sample."""

from __future__ import annotations

import json
import re

import pytest

from soup import rewards
from soup.errors import Refused

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is six times seven?"}]


def said(text):
    return [{"role": "assistant", "content": text}]


def one(word, text, **columns):
    """What the reward gives a single text."""
    given = {name: [value] for name, value in columns.items()}
    (value,) = rewards.load([word])[0](prompts=["a"], completions=[text], completion_ids=[[1]], **given)
    return value


@pytest.fixture
def own(tmp_path):
    def written(source, name="reward"):
        (tmp_path / "mine.py").write_text(source)
        return f"{tmp_path}/mine.py:{name}"

    return written


@pytest.mark.parametrize(
    ("word", "text", "wanted"),
    [
        ("exact_match", " 42 ", 1.0),
        ("exact_match", "It is 42", 0.0),
        ("exact_match:other", "forty-two", 1.0),
        ("exact_match:other", "42", 0.0),
        ("numeric", "6 x 7 = 42.0", 1.0),
        ("numeric", "42 or 43", 0.0),
        ("numeric", "no idea", 0.0),
        ("numeric:third", "41.99", 0.0),
        ("numeric:third", "so 3", 1.0),
        ("regex:^It is \\d+$", "It is 42", 1.0),
        ("regex:^It is \\d+$", "It is not", 0.0),
        ("regex:mine.py:\\d", "see mine.py:7", 1.0),
        ("length:4", "one two three four", 1.0),
        ("length:4", "one two", 0.5),
        ("length:4", "", 0.0),
        ("length:4", "a b c d e f g h i j", 0.0),
        ("length", " ".join("word" for _ in range(20)), 1.0),
        ("length", " ".join("word" for _ in range(15)), 0.75),
        ("json", '{"a": [1]}', 1.0),
        ("json", '```json\n{"a": 1}\n```', 1.0),
        ("json", '```\n{"a": 1}\n```\n', 1.0),
        ("json", "{'a': 1}", 0.0),
        ("json", 'Here it is: {"a": 1}', 0.0),
        ("json", "NaN", 0.0),
        ("json", "[" * 100_000, 0.0),
        ("json", "", 0.0),
        ("tags", "<think>6x7</think>\n<answer>42</answer>", 1.0),
        ("tags", "<answer>42</answer><think>6x7</think>", 0.0),
        ("tags", "<think>a</think><think>b</think><answer>42</answer>", 0.0),
        ("tags", "<think>a<answer>42</answer></think>", 0.0),
        ("tags", "<think>a</think>", 0.0),
        ("tags:sum", "well <sum>42</sum>", 1.0),
        ("tags:sum", "well <sum>42", 0.0),
        ("tags:a, b", "<a>1</a><b>2</b>", 1.0),
    ],
)
def test_built_in(word, text, wanted):
    (reward,) = rewards.load([word])
    assert reward.__name__ == word
    given = {"answer": ["42"], "other": ["forty-two"], "third": [3], "trainer_state": None}
    assert reward(prompts=[ASKED], completions=[said(text)], **given) == [pytest.approx(wanted)]
    assert reward(prompts=["six times seven"], completions=[text], **given) == [pytest.approx(wanted)]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("about 1234.50", "1,234.5"),
        ("1,000,000 in all", 1000000),
        ("it is -3.", "-3"),
        ("it is \u22123", -3),
        ("a loss of -$5", "-5"),
        ("5-3", "3"),  # a difference, no sign
        (".5", 0.5),
        ("0.00001", 1e-05),
        ("1, 2, 3", "3"),
        ("1,2345", "2345"),
        ("#### 42", "6 x 7 = <<6*7=42>>42\n#### 42"),
        ("#### 42\n(after 3 steps)", "42"),
        ("#### Step 1\nso 42", "42"),  # a heading is no answer
        (r"so \boxed{42}, as 6 x 7", "42"),
        (r"\boxed{41}, no, \boxed{x = \text{about } 42}", "42"),
        ("9" * 400, "9" * 400),
    ],
)
def test_numbers_as_people_write_them(text, answer):
    assert one("numeric", text, answer=answer) == 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3", "-3"),
        ("1,2", "12"),
        ("12345678902", "12345678901"),
        ("9" * 400, "8" * 400),
        ("1e" + "9" * 30, "5"),
        (r"\boxed{41} and not 42", "42"),
        (r"\boxed{x}, 42", "42"),
    ],
)
def test_other_numbers(text, answer):
    assert one("numeric", text, answer=answer) == 0.0


def test_a_row_without_an_answer_is_not_scored():
    for word in ("numeric", "exact_match"):
        (reward,) = rewards.load([word])
        assert reward(prompts=["a"] * 2, completions=["1", "1"], answer=[None, "1"]) == [None, 1.0]


def test_an_answer_without_a_number_is_an_error_of_the_data():
    with pytest.raises(rewards.RewardError, match=r"numeric .*no number in the answer 'yes'.* sample 1 "):
        rewards.load(["numeric"])[0](prompts=["a"] * 2, completions=["1", "2"], answer=["1", "yes"])


def test_own_rewards_see_the_columns_as_trl_gives_them(own):
    word = own(
        "seen = {}\n"
        "def reward(prompts, completions, level, **given):\n"
        "    seen.update(given, prompts=prompts, completions=completions)\n"
        "    given['log_metric']('levels', len(level))\n"
        "    return level\n"
    )
    (reward,) = rewards.load([word])
    assert reward.__name__ == word
    logged = []
    call = {
        "prompts": [ASKED] * 2,
        "completions": [said("c"), said("d")],
        "completion_ids": [[1], [2]],
        "topic": ["x", "y"],
        "trainer_state": object(),
        "log_extra": print,
        "log_metric": lambda *told: logged.append(told),
    }
    assert reward(**call, level=[True, None]) == [1.0, None]
    assert reward.__wrapped__.__globals__["seen"] == call
    assert logged == [("levels", 2)]


def test_one_file_runs_once_for_its_rewards_and_again_when_it_changes(own, tmp_path):
    source = "import itertools\ncount = itertools.count({start})\n" + "".join(
        f"def {name}(completions, **_):\n    return [next(count)]\n" for name in ("first", "second")
    )
    words = [own(source.format(start=5), "first"), f"{tmp_path}/mine.py:second"]
    assert [reward(prompts=["a"], completions=["b"]) for reward in rewards.load(words)] == [[5.0], [6.0]]
    own(source.format(start=7))
    assert rewards.load(words)[0](prompts=["a"], completions=["b"]) == [7.0]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_own_files_may_hold_classes_and_callable_objects(own):
    word = own(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Fixed:\n"
        "    value: float\n"
        "    def __call__(self, completions, **_):\n"
        "        return [self.value for _ in completions]\n"
        "reward = Fixed(0.25)\n"
    )
    assert one(word, "b") == 0.25


def test_own_files_are_compiled_as_they_stand(own):
    """Without the `from __future__ import annotations` of the module that compiles them."""
    word = own(
        "def hinted() -> int: ...\nkind = hinted.__annotations__['return']\n"
        "def reward(**_):\n    return [kind(7)]\n"
    )
    assert one(word, "b") == 7.0


@pytest.mark.parametrize(
    ("answers", "reward", "why"),
    [
        (["6", "six"], "numeric", "there is no number in the answer 'six'"),
        ([None, None], "exact_match", "`answer` is null in every row"),
        (["6", "7"], "numeric:solution", "the column `solution`, which the data do not have"),
        (["6", None], "numeric", None),
        (["6", "six"], "exact_match", None),
    ],
)
def test_answers_are_looked_at_before_a_model_is_loaded(answers, reward, why, tiny_model, tmp_path):
    from soup.cli.check import checked
    from soup.cli.compose import drive
    from soup.cli.main import parse

    rows = [{"prompt": f"What is {i}?", "answer": answer} for i, answer in enumerate(answers)]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "task=grpo",
        "model=hub",
        f"model.base={tiny_model}",
        f"data.train={data}",
        "data.eval_fraction=0",
    ]
    words += ["training.batch_size=4", f"task.rewards=['{reward}']"]
    (found,) = drive(parse(words), lambda points: checked(points, train=True))
    if why is None:
        assert not isinstance(found, Refused), found
    else:
        (problem,) = found.problems
        assert (problem.key, problem.value) == ("task.rewards", reward)
        assert why in problem.why


def test_columns_and_files(own, tmp_path):
    word = own("def reward(prompts, completions, *rest, level, hint=None, **_): ...\n")
    words = ["numeric", "exact_match:solution", "exact_match", "length", "regex:a.py:b", word, word]
    assert rewards.columns(words) == {"answer": "numeric", "solution": "exact_match:solution", "level": word}
    assert rewards.files(words) == [tmp_path / "mine.py"]


@pytest.mark.parametrize(
    ("word", "why", "fix"),
    [
        ("lenght:9", "no such reward", "did you mean length?"),
        ("nothing_like_it", "no such reward", "one of exact_match, numeric, regex, length, json, tags, or"),
        ("regex", "needs an argument", "regex:PATTERN"),
        ("regex:", "needs an argument", "regex:PATTERN"),
        ("regex:(", "cannot be used: missing )", "regex:PATTERN"),
        ("length:", "needs an argument after the colon", "length:20"),
        ("length:many", "number of words", "length:20"),
        ("length:2.5", "number of words", "length:20"),
        ("length:0", "at least 1", "length:20"),
        ("length:-4", "at least 1", "length:20"),
        ("json:yes", "takes no argument", "json"),
        ("json:", "takes no argument", "json"),
        ("tags:<think>", "names with commas", "tags:think,answer"),
        ("tags:think,", "names with commas", "tags:think,answer"),
        ("numeric:", "needs an argument after the colon", "numeric:answer"),
        ("exact_match:prompt", "no column `prompt`", "exact_match:COLUMN"),
        (
            "nowhere/mine.py:reward",
            "nowhere/mine.py cannot be read: No such file",
            "path/to/file.py:function",
        ),
        ("nowhere/mine.py", "names no function", "path/to/file.py:function"),
        ("nowhere/mine.py:", "names no function", "path/to/file.py:function"),
    ],
)
def test_refused(word, why, fix):
    with pytest.raises(Refused, match=re.escape(why)) as refused:
        rewards.load([word])
    (problem,) = refused.value.problems
    assert problem.key == "task.rewards" and problem.value == word and problem.fix.startswith(fix)


def test_a_reward_is_named_once():
    with pytest.raises(Refused, match="json is there 2 times") as refused:
        rewards.load(["json", "length:5", "json", "length:6"])
    (problem,) = refused.value.problems
    assert problem.key == "task.rewards" and problem.value == "json" and "reward_weights" in problem.fix


def test_problems_come_together(own):
    bad = own("reward = 3\n")
    with pytest.raises(Refused) as refused:
        rewards.load(["lenght", "json", "regex:(", bad])
    assert [problem.value for problem in refused.value.problems] == ["lenght", "regex:(", bad]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("def reward(:\n", "mine.py:1 cannot be imported: SyntaxError: "),
        ("\nimport nothing_of_this_name\n", "mine.py:2 cannot be imported: ModuleNotFoundError: No module"),
        ("def f():\n    assert False\n\nf()\n", "mine.py:2 cannot be imported: AssertionError"),
        ("import sys\nsys.exit(0)\n", "mine.py:2 cannot be imported: SystemExit"),
        ("def other(**_): ...\n", "mine.py has no reward"),
        ("reward = 3\n", "reward is no function"),
        ("class reward: ...\n", "reward is no function"),
        ("def reward(prompts, completions): ...\n", "unexpected keyword argument 'completion_ids'"),
        (
            "def reward(prompts, completions, completion_ids, trainer_state, log_extra, log_metric): ...\n",
            "unexpected keyword argument 'any_other_column'",
        ),
        ("def reward(prompt, completion, **_): ...\n", "missing a required argument: 'prompt'"),
        ("def reward(first, /, **_): ...\n", "missing a required argument: 'first'"),
        ("reward = max\n", "no signature found"),
        ("async def reward(**_): ...\n", "asynchronous"),
        ("class A:\n    async def __call__(self, **_): ...\nreward = A()\n", "asynchronous"),
    ],
)
def test_own_files_that_cannot_be_used(own, monkeypatch, tmp_path, source, why):
    word = own(source)
    monkeypatch.chdir(tmp_path)
    for written in (word, "mine.py:reward"):
        with pytest.raises(Refused, match=re.escape(why)) as refused:
            rewards.load([written])
        (problem,) = refused.value.problems
        assert problem.key == "task.rewards" and problem.value == written and problem.fix


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (
            "return [1 / len(text) for text in completions]",
            r"raised ZeroDivisionError.*sample 1 \('b', answered ''\)",
        ),
        ("return [{'x': 1}[one] for one in level]", r"raised KeyError: 'y', on sample 1 "),
        ("raise KeyError(len(completions))", "raised KeyError: 3, on sample 0 "),
        ("return [1 / (3 - len(completions))]", "raised ZeroDivisionError: .*, on this batch of 3"),
        ("return [completions[1], 1 / 0] if len(completions) == 3 else completions[1]", "on this batch of 3"),
        ("raise ValueError('first\\nsecond')", "raised ValueError: first, on"),
        ("return [1.0]", "a list of 1, and not a list of 3"),
        ("return 1.0", "returned a float, and not a list of 3"),
        ("return None", "returned a NoneType"),
        ("return 'abc'", "returned a str of 3"),
        ("return b'abc'", "returned a bytes of 3"),
        ("return (1.0 for _ in completions)", "returned a generator"),
        ("return [1.0, float('nan'), 2.0]", r"gave nan to sample 1 \('b', answered ''\)"),
        ("return [1.0, 2.0, float('-inf')]", "gave -inf to sample 2"),
        ("return [1.0, 2.0, 1e39]", "gave 1e[+]39 to sample 2"),
        ("return [10 ** 400, 2.0, 1.0]", "gave 10000.* to sample 0"),
        ("return [1.0, 'high', 2.0]", "gave 'high' to sample 1"),
        ("return [1.0, [1.0], 2.0]", r"gave \[1.0\] to sample 1"),
    ],
)
def test_what_a_reward_does_wrong_names_it_and_the_sample(own, body, why):
    word = own(f"def reward(prompts, completions, level, **_):\n    {body}\n")
    (reward,) = rewards.load([word])
    with pytest.raises(rewards.RewardError, match=why) as error:
        reward(
            prompts=["a", "b", "c"], completions=["x", "", "yz"], level=["x", "y", "x"], trainer_state=None
        )
    assert word in str(error.value)
    assert "\n" not in str(error.value)
    if "raised" in why or "batch" in why:
        assert isinstance(error.value.__cause__, Exception)


def test_an_error_shows_the_start_of_the_question_and_the_answer(own):
    (reward,) = rewards.load([own("def reward(**_):\n    return ['no number']\n")])
    with pytest.raises(rewards.RewardError) as error:
        reward(prompts=[ASKED], completions=[said("six " * 500)])
    assert f"sample 0 ('What is six times seven?', answered {('six ' * 15)!r})" in str(error.value)
    assert len(str(error.value)) < 400


def test_arrays_are_lists(own):
    numpy = "import numpy\ndef reward(completions, **_):\n    return {}\n"
    for returned in (
        "numpy.ones(1, dtype=numpy.float32)",
        "[numpy.float32(1)]",
        "numpy.array([True])",
        "(1,)",
    ):
        assert one(own(numpy.format(returned)), "b") == 1.0
