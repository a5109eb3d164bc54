"""How many processes a run may have: those it was made for, and those that this machine holds."""

from __future__ import annotations

import re

import pytest

from soup.errors import Refused


def test_another_number_of_processes_is_refused(tree, tmp_path):
    from soup.cli.check import checked
    from soup.cli.compose import Point
    from soup.cli.multirun import alike
    from soup.cli.run import settle

    def one(*words):
        words = ("distributed=ddp", f"run.root={tmp_path}", *words)
        (found,) = checked([Point(tree=tree(*words), choices={}, overrides=words)], train=True)
        return found

    def settled(*words):
        return settle(one(*words))

    two = settled("distributed.processes=2")
    assert settled("distributed.processes=2") == two
    assert settled("distributed.processes=2", "distributed.timeout_s=9") == two
    with pytest.raises(Refused, match="distributed.processes=4: run .* was made for 2"):
        settled("distributed.processes=4")
    assert settled("distributed.processes=4", "run.resume=never") != two

    with pytest.raises(Refused, match="distributed.processes=4: another point is the same run for 2"):
        alike([one("distributed.processes=2"), one("distributed.processes=4")])
    alike([one(f"distributed.processes={n}", "run.resume=never") for n in (2, 4)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("distributed=ddp", "distributed.processes=4096"),
            "distributed.processes=4096: .*each of 4096.*processes=",
        ),
        (
            ("training.batch_size=100000",),
            "training.batch_size=100000: .*this machine has .*gradient_checkpointing",
        ),
    ],
)
def test_what_this_machine_cannot_hold_is_refused(tree, words, said):
    from soup.cli.check import checked
    from soup.cli.compose import Point

    point = Point(tree=tree(*words), choices={}, overrides=words)
    assert re.search(said, str(checked([point], train=True)[0]), re.DOTALL)
    assert not isinstance(checked([point], train=False)[0], Refused)  # another machine may
