"""`soup report` without a browser: what it chooses, reads, compares and writes, whatever the folders hold."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import shlex
import subprocess
import sys

import pytest
from filelock import FileLock

from soup import inputs, record, schema
from soup.cli.compose import drive
from soup.cli.main import main, parse
from soup.model import source
from soup.record import Run, write_json
from soup.report import page, point
from soup.report.axes import axis
from soup.report.chosen import choose
from soup.report.content import gather
from soup.report.curves import curves, thinned
from soup.report.importance import importance
from soup.report.keys import columns, shared, shown
from soup.report.keys import settings as settings_of

EVIL = "<script>window.evil=1</script><img src=x onerror=window.evil=2>"


@pytest.fixture(scope="module")
def grid(folders):
    """A sweep of 12: one in each state that is not finished, the others finished, and one left out."""
    made = folders()
    states = ("failed", "diverged", "interrupted", "running", "new", "pruned")
    out = {"overrides": ["lora.r=0"], "why": "lora.r=0: must be at least 1"}
    made.sweep_ = made.sweep(12, states=states, invalid=[out])
    lock = FileLock(Run(made.root / f"{3:012x}").lock_file)
    with lock:
        yield made


@pytest.fixture(scope="module")
def content(grid):
    return gather(choose(grid.root, []))


def text_of(html, name="data"):
    packed = re.search(rf'id="{name}">([^<]*)<', html)[1]
    return gzip.decompress(base64.b64decode(packed)).decode()


def rows_of(html):
    body = re.search(r'<table id="table">.*?</table>', html, re.DOTALL)[0]
    return [
        re.findall(r'data-sort="(.*?)"', row) for row in re.findall(r"<tr data-id.*?</tr>", body, re.DOTALL)
    ]


def test_words_choose_sweeps_and_runs(grid):
    root, made = grid.root, grid.sweep_
    assert choose(root, []).name == made.id == choose(root, ["latest"]).name
    assert len(choose(root, [made.id[:5]]).points) == 12
    (one,) = choose(root, ["00000000000a"]).points
    assert one[0].id == "00000000000a" and one[1] is None
    both = choose(root, ["00000000000a", made.id])  # the run once, as the sweep's point
    assert len(both.points) == 12 and all(point is not None for _, point in both.points)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["zz"], "report=zz: no runs or sweeps"),
        (["0000"], "12 runs or sweeps"),
        (["--out", "a.pdf"], "is the page, an .html file"),
        (["run.root=nowhere"], "holds no run"),
        (["lora.r=3"], "no override but run.root"),
        (["--json"], "`report` prints no JSON"),
    ],
)
def test_what_cannot_be_reported_is_refused(grid, capsys, words, said):
    given = [] if any(word.startswith("run.root") for word in words) else [f"run.root={grid.root}"]
    assert main(["report", *words, *given]) == 2
    assert said in capsys.readouterr().err


def test_out_is_the_reports(capsys):
    assert main(["status", "--out", "a.html"]) == 2
    assert "--out: is for `import` and `report` and `generate` only" in capsys.readouterr().err


def test_a_missing_package_names_its_extra(grid, capsys, monkeypatch):
    from soup.cli import report

    monkeypatch.setattr(report, "find_spec", lambda name: None if name == "plotly" else object())
    assert main(["report", f"run.root={grid.root}"]) == 2
    told = capsys.readouterr().err
    assert "needs plotly, which is not installed" in told and "pip install 'soup-launcher[report]'" in told


def test_states_values_and_the_best(content):
    states = {one.number: one.state for one in content.points}
    assert list(states.values())[:6] == ["failed", "diverged", "interrupted", "running", "new", "pruned"]
    assert content.counts["finished"] == 6 and len(content.ranked) == 6
    assert content.best is min(content.ranked, key=lambda one: one.value)
    assert content.best.value == content.best.result["eval_loss"]
    assert content.points[3].value == content.points[3].lines[-1]["eval_loss"]  # of one that runs, its last
    assert content.points[4].value is None and content.points[4].lines == ()
    assert content.best.measured_bytes == content.best.result["peak_memory_bytes"]
    assert 900 < content.best.tokens_per_s < 1100


def test_swept_keys_are_the_columns(content):
    assert content.keys == ("lora.r", "optim.lr", "optim.scheduler")


def test_runs_of_different_tasks_differ_by_group(folders):
    made = folders()
    made.run("a1")
    made.run("b2", task__name="dpo", lora__r=4)
    made.run("c3", run__name="named", run__root="/elsewhere")
    found = gather(choose(made.root, ["a1", "b2", "c3"]))
    assert found.title == "3 runs" and list(found.keys) == ["task", "lora.r"]
    assert found.points[2].name == "named"


def test_frozen_configurations_are_read_as_omegaconf_reads_them(folders):
    tree = {
        "run": {"name": "yes", "root": "1e3", "objective": "eval_loss"},
        "task": {"name": "1_000"},
        "values": [
            1e-05,
            1e20,
            -0.0,
            123,
            "1e-5",
            "null",
            None,
            True,
            "on",
            "0x1F",
            "1:30",
            float("inf"),
            "2026-11-25",
        ],
        "text": "a: b\n#c\u2028 d 'e' \"f\" 🙂",
        "empty": {},
    }
    run = record.place(folders().root, "odd", tree, resume="auto")
    assert point._tree(run) == run.tree() == tree


def test_metrics_that_nobody_could_draw(folders):
    made = folders()
    run = made.run("a1", lines=0, state="interrupted")
    run.metrics.write_text(
        '{"step": 1, "loss": NaN}\n5\n{"step": 2, "loss": 1.0, "flag": true, "words": "x"}\n{"ste'
    )
    (one,) = gather(choose(made.root, ["a1"])).points
    drawn = curves([one], ["loss"], 100)["loss"]
    assert drawn == [([1, 2], [None, None], [None, 1.0])]
    assert gather(choose(made.root, ["a1"])).metrics == ("loss",)


@pytest.mark.parametrize("broken", ["config.yaml", "result.json", "effective.json", "plan.json"])
def test_a_file_that_cannot_be_read_is_that_runs_error(folders, broken):
    made = folders()
    made.run("a1")
    (made.run("b2").folder / broken).write_bytes(b"{\xff: [")
    good, bad = gather(choose(made.root, ["a1", "b2"])).points
    assert good.state == "finished" and bad.state == "unreadable" and broken in bad.error
    assert broken in page.page(gather(choose(made.root, ["a1", "b2"])))


def test_a_run_whose_folder_is_gone(folders):
    import shutil

    made = folders()
    made.sweep(3)
    shutil.rmtree(made.root / f"{1:012x}")
    found = gather(choose(made.root, []))
    assert found.counts == {"finished": 2, "gone": 1} and "is not there" in found.failures[0].error
    assert "is not there" in page.page(found)


def test_a_spike_survives_thinning():
    values = [1.0] * 10_000
    values[1234], values[4321], values[777] = 50.0, -50.0, None
    kept = thinned(values, 60)
    assert len(kept) <= 60 and {0, 1234, 4321, 777, 9999} <= set(kept) and kept == sorted(kept)
    assert thinned(values[:60], 60) == list(range(60))


def test_importance_finds_the_key_that_decides(folders):
    made = folders()
    made.sweep(60)
    found = gather(choose(made.root, []))
    shares = dict(found.importance.shares)
    assert max(shares, key=shares.get) == "optim.lr" and sum(shares.values()) == pytest.approx(1)
    assert "60 points" in found.importance.note
    few = importance(found.points[:5], found.keys)
    assert not few.shares and "needs 8 points" in few.note
    assert "fewer than two differ" in importance(found.points, ["lora.r"]).note


def test_an_objective_to_be_large_is_ranked_so(folders):
    made = folders()
    for name, goal in (("a1", 1.0), ("b2", 3.0), ("c3", 2.0)):
        made.run(name, run__objective="-loss", goal=goal)
    found = gather(choose(made.root, ["a1", "b2", "c3"]))
    assert found.best.id == "b2" and found.metric == "loss"
    html = page.page(found)
    assert [row[0] for row in rows_of(html)] == ["2", "3", "1"] and 'aria-sort="descending"' in html


def test_settings_of_all_and_of_each(content):
    assert {"lora.r", "optim.lr", "optim.scheduler"}.isdisjoint(content.shared)
    epochs = content.shared["training.epochs"]
    assert (epochs.requested, epochs.effective, epochs.resolved) == ("1", "1.36", True)
    own = {one.key: one.effective for one in content.own(content.points[5])}
    assert own["lora.r"] == "2" and {"lora.r", "optim.lr", "optim.scheduler"} <= set(own) <= {
        *own,
        "run.root",
    }
    unproved = content.own(content.points[0])
    assert {one.effective for one in unproved} == {"-"}
    assert shared([]) == {} and settings_of(content.points[0])[0].how.startswith("not proved")


def test_the_page_holds_all_and_asks_for_nothing(content):
    html = page.page(content)
    assert len(html.encode()) < 6_000_000
    assert not re.search(r'(?:src|href)="(?!#|data:,)', html) and "@import" not in html
    assert "default-src 'none'" in html
    data = json.loads(text_of(html))
    assert len(data["points"]) == 12 and data["scored"] == 6 and len(data["curves"]["loss"]) == 12
    assert "plotly.js v" in text_of(html, "library")
    values = [float(row[4]) if row[4] else math.inf for row in rows_of(html)]
    assert len(values) == 12 and values == sorted(values) and content.best.value in values
    assert "loading: 100%" in html and "loading: 10%\r" not in html  # of a progress bar what was last there
    assert "must be at least 1" in html  # of the point that was left out
    assert "optim.lr=tag(log,interval(1e-5,1e-1))" in html


def test_what_runs_say_is_never_markup(folders):
    made = folders()
    made.run("a1", run__name=EVIL, model__base=EVIL)
    made.run("b2", state="failed", error=EVIL, log=EVIL, lora__target_modules=EVIL)
    run = made.run("c3")
    write_json(run.environment, {"host": EVIL, "packages": {"torch": EVIL}})
    write_json(run.effective, {EVIL: {"requested": EVIL, "effective": EVIL, "ok": False, "how": EVIL}})
    run.metrics.write_text(json.dumps({"step": 1, EVIL: 1.0, "eval_loss": 1.0}) + "\n")
    found = gather(choose(made.root, ["a1", "b2", "c3"]))
    html = page.page(found)
    plain = html.replace(text_of(html, "library"), "")
    assert "<script>window" not in plain and "<img" not in plain
    assert html.count("<script") == 3 and html.count("</script>") == 3
    assert html.count("&lt;script&gt;window.evil=1&lt;/script&gt;") > 10


def test_much_is_told_in_less_detail(content, monkeypatch):
    whole = page.page(content)
    monkeypatch.setattr(page, "LIMIT_BYTES", len(whole) - 1000)
    monkeypatch.setattr(page, "DETAILS", (*page.DETAILS[:1], page.Detail(50, 5)))
    less = page.page(content)
    assert less.count('<details class="run" id="run-') == 5
    assert "7 more runs have no section here" in less and f'id="run-{content.best.id}"' in less
    assert len(rows_of(less)) == 12


def test_writes_a_page_and_a_picture(grid, tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    assert main(["report", f"run.root={grid.root}", "--out", "new/r.html"]) == 0
    out = capsys.readouterr().out
    assert "6 finished" in out and str(tmp_path / "new/r.html") in out
    with Image.open(tmp_path / "new/r.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 100
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["r.html", "r.png"]
    assert main(["report", f"run.root={grid.root}", "00000000000a"]) == 0
    assert (grid.root / "reports/00000000000a.html").is_file()


@pytest.mark.parametrize("name", ["$x_1$ \\frac", "名前 🙂", EVIL, "a" * 400])
def test_a_picture_of_one_run_of_any_name(folders, name, recwarn):
    made = folders()
    made.run("a1", run__name=name, state="new")
    made.run("b2", run__name=name)
    assert main(["report", f"run.root={made.root}", "a1", "b2"]) == 0
    assert main(["report", f"run.root={made.root}", "b2"]) == 0
    assert not [one for one in recwarn if "Glyph" in str(one.message)]


def test_a_folder_that_cannot_be_written(grid, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["report", f"run.root={grid.root}", "--out", str(tmp_path / "file/r.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_runs_command_makes_the_same_run(compose, tiny_model, folders):
    """`python -m soup --config-path FOLDER` composes what the folder holds, so it is the run that is there."""
    tree = compose(
        "model=hub",
        f"model.base={tiny_model}",
        "lora=dora",
        "optim=lion",
        "launch.device=cpu",
        "run.name=a b",
    )
    content = inputs.content(schema.check(tree), source.folder(schema.check(tree).model))
    identity = record.run_id(tree, content)
    run = record.place(folders().root, identity, tree, resume="auto")
    from soup.report.versions import reproduce

    words = shlex.split(reproduce(run.folder))
    assert words[:3] == ["python", "-m", "soup"]
    again = drive(parse(words[3:]), lambda points: points[0].tree)
    assert again == tree and record.run_id(again, content) == identity


def test_no_torch(grid):
    code = (
        f"import sys; from soup.cli.main import main; main(['report', 'run.root={grid.root}']); "
        "print([name for name in ('torch', 'transformers', 'sklearn', 'omegaconf.oc') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and not done.stderr


def test_labels_of_an_axis_do_not_lie_over_one_another():
    found = axis("eval_loss", [3.49, 3.507, 4.608, 4.627])
    assert [label for _, label in found.ticks] == ["4.627", "3.49"] and found.places[1] == 3.507
    log = axis("optim.lr", [1e-4, 1e-3, 1e-2])
    assert log.places == pytest.approx((-4, -3, -2)) and [label for _, label in log.ticks][-1] == "0.0001"
    names = axis("lora.r", ["16", "8", None, "all"])
    assert [label for _, label in names.ticks] == ["8", "16", "all", "null"]
    assert axis("x", [5, 5]).ticks == ((5.0, "5"),)


def test_values_as_people_read_them():
    told = {
        None: "null",
        True: "true",
        1e-5: "1e-05",
        0.30000000000000004: "0.3",
        12345678: "12345678",
        "a": "a",
    }
    assert {value: shown(value) for value in told} == told
    assert shown(["a", 1]) == '["a", 1]' and columns(()) == []
