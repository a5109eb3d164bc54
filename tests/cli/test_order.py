"""Command, overrides and flags mean the same in any order."""

from itertools import permutations

import pytest

from soup.cli.main import parse
from soup.errors import Refused


def test_any_order_is_one_command_line():
    words = ["plan", "--json", "-m", "lora.r=1,2", "task=dpo"]
    for order in permutations(words):
        args = parse(order)
        assert (args.command, args.json, args.multirun) == ("plan", True, True)
        assert sorted(args.overrides) == ["lora.r=1,2", "task=dpo"]


def test_overrides_keep_their_order():
    args = parse(["a=1", "--multirun", "b=2", "plan", "c=3", "--json", "~d"])
    assert args.overrides == ["a=1", "b=2", "c=3", "~d"]


def test_no_command_runs():
    assert parse(["lora.r=8"]).command == "run"


def test_a_value_is_no_command():
    assert parse(["run.name=plan"]).command == "run"


def test_info_does_not_swallow_an_override():
    args = parse(["--info", "task=dpo"])
    assert (args.info, args.overrides) == ("all", ["task=dpo"])
    assert parse(["-i", "searchpath", "task=dpo"]).info == "searchpath"


def test_words_go_to_a_command_that_does_not_compose():
    args = parse(["show", "runs", "run.root=there", "abc123"][1:] + ["show"])
    assert (args.command, args.words, args.run_root) == ("runs", ["abc123", "show"], "there")


def test_run_root_has_its_default_from_yaml():
    assert parse(["runs"]).run_root == "outputs"


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["--json"], "--json"),
        (["--json", "plan", "--cfg", "job"], "--json"),
        (["--resolve"], "--resolve"),
        (["--package", "lora"], "--package"),
        (["--multirun", "--cfg", "job"], "--multirun --cfg"),
        (["--multirun", "runs"], "--multirun"),
        (["--experimental-rerun", "x.pickle"], "--experimental-rerun"),
        (["runs", "lora.r=8"], "lora.r=8"),
        (["runs", "run.root="], "run.root="),
        (["plan", "prove"], "prove"),
        (["pln"], "pln"),
        ([""], "''"),
        (["--cfg", "jobs"], "command line"),
        (["--no-such-flag"], "command line"),
        (["--config-dir"], "command line"),
    ],
)
def test_a_senseless_line_is_refused(argv, key):
    with pytest.raises(Refused) as refused:
        parse(argv)
    assert [problem.key for problem in refused.value.problems] == [key]


def test_all_senseless_flags_are_named_at_once():
    with pytest.raises(Refused) as refused:
        parse(["--json", "--resolve", "nonsense", "--package", "lora"])
    assert len(refused.value.problems) == 4
