"""Plans of many points: what they share is read once, and each further point is as much work as the one before."""

import sys

import pytest

from soup.cli.check import checked
from soup.cli.compose import drive
from soup.cli.main import parse
from soup.cli.points import table, whereabouts
from soup.data import prepare
from soup.errors import Refused


@pytest.fixture
def plan(tiny_model, tmp_path, monkeypatch):
    """The table of `soup plan --multirun` with that many seeds."""
    monkeypatch.chdir(tmp_path)

    def lines(count, *words):
        def shown(points):
            found = checked(points, train=False)
            assert not any(isinstance(one, Refused) for one in found)
            return table(points, found, [whereabouts(one) for one in found], pruner=False)

        tiny = ("model=hub", f"model.base={tiny_model}", "launch.device=cpu", "data.num_proc=1")
        seeds = f"training.seed=range(0,{count})"
        return drive(parse(["plan", "-m", *tiny, seeds, "optim.lr=1e-3,1e-4", *words]), shown)

    return lines


def calls(work):
    """How many Python functions it calls."""
    count = 0

    def note(_frame, event, _argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_work_grows_with_the_number_of_points_and_no_faster(plan):
    plan(2)  # what is imported, measured and kept once
    ten, twenty, forty = (calls(lambda n=n: plan(n)) for n in (5, 10, 20))
    assert forty - twenty < 2.1 * (twenty - ten)
    assert (forty - twenty) / 20 < 50_000, "33,000 were measured"


def test_points_that_share_data_have_it_measured_once_and_others_their_own(plan, monkeypatch):
    asked = []
    lengths, fingerprint = prepare.lengths, prepare.fingerprint
    monkeypatch.setattr(prepare, "lengths", lambda **how: asked.append("lengths") or lengths(**how))
    monkeypatch.setattr(
        prepare, "fingerprint", lambda **how: asked.append("fingerprint") or fingerprint(**how)
    )
    assert len(plan(3, "data.max_length=77,78")) == 13
    assert asked.count("lengths") == 2 and asked.count("fingerprint") == 4


@pytest.mark.usefixtures("plan")
def test_a_point_that_shares_all_but_its_seed_is_a_run_of_its_own():
    def ids(points):
        found = checked(points, train=False)
        return [whereabouts(one).id for one in found]

    words = ["plan", "-m", "training.seed=1,2", "training.data_seed=null,3", "launch.device=cpu"]
    assert len(set(drive(parse(words), ids))) == 4
