"""A run is there for one number of processes: another number does not go on with it."""

from __future__ import annotations

import pytest

from soup.errors import Refused


def test_another_number_of_processes_is_refused(tree, tmp_path):
    from soup.cli.check import checked
    from soup.cli.compose import Point
    from soup.cli.run import settle

    def settled(*words):
        words = ("distributed=ddp", f"run.root={tmp_path}", *words)
        (found,) = checked([Point(tree=tree(*words), choices={}, overrides=words)], train=True)
        return settle(found)

    two = settled("distributed.processes=2")
    assert settled("distributed.processes=2") == two
    assert settled("distributed.processes=2", "distributed.timeout_s=9") == two
    with pytest.raises(Refused, match="distributed.processes=4: run .* was made for 2"):
        settled("distributed.processes=4")
    assert settled("distributed.processes=4", "run.resume=never") != two
