"""A run is there for one number of processes: another number does not go on with it."""

from __future__ import annotations

import pytest

from soup.errors import Refused


def test_another_number_of_processes_is_refused(tree, tmp_path, tiny_model):
    from soup import schema
    from soup.cli.check import Checked
    from soup.cli.compose import Point
    from soup.cli.run import settle
    from soup.device import resolve

    def settled(*words):
        words = ("distributed=ddp", f"run.root={tmp_path}", *words)
        config = schema.check(tree(*words))
        point = Point(tree=config.tree, choices={}, overrides=words)

        class plan:
            to_dict = staticmethod(dict)

        return settle(
            Checked(
                point=point,
                config=config,
                device=resolve("cpu"),
                model_folder=tiny_model,
                reports={},
                plan=plan,
            )
        )

    two = settled("distributed.processes=2")
    assert settled("distributed.processes=2") == two
    assert settled("distributed.processes=2", "distributed.timeout_s=9") == two
    with pytest.raises(Refused, match="distributed.processes=4: run .* was made for 2"):
        settled("distributed.processes=4")
    assert settled("distributed.processes=4", "run.resume=never") != two
