"""A run is there for one number of processes, which fit this machine: another number does not go on with it."""

from __future__ import annotations

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


def test_more_processes_than_this_machine_has_memory_for_are_refused(tree):
    from soup.cli.check import checked
    from soup.cli.compose import Point
    from soup.device import resolve
    from soup.plan.memory import RUNTIME_BYTES

    for processes in (2, int(resolve("cpu").memory_bytes / RUNTIME_BYTES["cpu"]) + 1):
        words = ("launch.device=cpu", "distributed=ddp", f"distributed.processes={processes}")
        point = Point(tree=tree(*words), choices={}, overrides=words)
        (found,) = checked([point], train=True)
        assert isinstance(found, Refused) == (processes > 2)
        assert processes == 2 or f"{processes}: each process takes 0.85 GB" in str(found)
    (found,) = checked([point], train=False)  # a plan is of any machine
    assert not isinstance(found, Refused)
