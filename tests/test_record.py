"""Runs on disk: what makes a run the same run, files that are whole or absent, and the states a run can be in."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock

from soup import inputs, record, schema
from soup.errors import RecordError, Refused
from soup.model import source
from soup.record import Run

ROW = {"prompt": "Is the lamp lit?", "completion": "It is."}


@pytest.fixture
def identity(tree, tmp_path):
    """The id of the run that these overrides ask for, trained on one file of rows."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")

    def of(*overrides):
        config = schema.check(tree(f"data.train={tmp_path}/rows.jsonl", *overrides))
        content = inputs.content(config, source.folder(config.model))
        return record.run_id(config.tree, content)

    return of


@pytest.mark.parametrize(
    "overrides",
    [
        ("run.name=other", "run.resume=never", "run.objective=loss"),
        ("run.root=elsewhere",),
        ("tracking=tensorboard",),
        ("tracking=[wandb,tensorboard]", "tracking.wandb.tags=[a]"),
        ("launch.slots=2", "launch.invalid=skip"),
        ("launch.device=auto", "launch.wait=false"),
        ("distributed.processes=2",),
        ("distributed.nodes=3",),
    ],
    ids=" ".join,
)
def test_where_and_how_a_run_is_kept_is_not_its_identity(identity, overrides):
    assert identity(*overrides) == identity()


@pytest.mark.parametrize(
    "override",
    [
        "training.seed=1",
        "training.logging_steps=6",
        "optim.lr=1e-3",
        "lora=dora",
        "lora=none",
        "task=pretrain",
        "model.dtype=bfloat16",
        "backend.kernels=stock",
        "data.max_length=64",
        "data.format=prompt_completion",
        "distributed=ddp",
        "longctx=linear",
        "model.chat_template={{ messages[0].content }}",
    ],
)
def test_what_is_trained_is(identity, override):
    key, _, value = override.partition("=")
    assert identity(f'{key}="{value}"' if "{" in value else override) != identity()


def test_the_data_is_known_by_its_content(identity, tmp_path):
    file = tmp_path / "rows.jsonl"
    before = identity()
    os.utime(file, (1, 1))
    assert identity() == before, "not by its time"
    file.write_text(json.dumps(ROW | {"completion": "It is not."}) + "\n")
    assert identity() != before
    file.write_text(json.dumps(ROW) + "\n")
    assert identity() == before


def test_a_template_file_is_known_by_its_content(identity, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}{{ m.role + m.content }}{% endfor %}")
    before = identity(f"model.chat_template={file}")
    file.write_text("{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}")
    assert identity(f"model.chat_template={file}") != before


def test_a_model_folder_is_known_by_its_content(identity, tiny_model, tmp_path):
    import shutil

    copied = tmp_path / "model"
    shutil.copytree(tiny_model, copied)
    before = identity(f"model.base={copied}")
    weights = copied / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert identity(f"model.base={copied}") != before


def test_source_is_part_of_every_identity(monkeypatch):
    tree = {"distributed": {"name": "none", "processes": 1, "nodes": 1}}
    before = record.run_id(tree, {})
    assert len(before) == 12 and int(before, 16) >= 0
    monkeypatch.setattr(record, "source_hash", lambda: "another")
    assert record.run_id(tree, {}) != before


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "result.json"
    record.write(path, "old")
    record.write(path, "new, with ü")
    assert path.read_text(encoding="utf-8") == "new, with ü"
    assert [child.name for child in tmp_path.iterdir()] == ["result.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    """A limit on the size of files stands for a full disk."""
    code = (
        "import resource; from pathlib import Path; from soup import record\n"
        "from soup.errors import RecordError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        f"path = Path({str(tmp_path / 'result.json')!r})\n"
        "record.write(path, 'small')\n"
        "try:\n"
        "    record.write(path, 'x' * 101)\n"
        "except RecordError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{tmp_path / 'result.json'}: File too large"
    assert (tmp_path / "result.json").read_text() == "small"
    assert [child.name for child in tmp_path.iterdir()] == ["result.json"]


def test_many_writers_of_one_file(tmp_path):
    """Whoever wins, a reader never sees a mixture."""
    path = tmp_path / "shared.json"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        done = [pool.apply_async(_writes, (path, letter)) for letter in "abc"]
        while not all(one.ready() for one in done):
            text = path.read_text() if path.exists() else ""
            assert len(set(text)) <= 1 and len(text) in (0, 20_000)
        for one in done:
            one.get()


def _writes(path, letter):
    for _ in range(30):
        record.write(path, letter * 20_000)


def test_places(tree, tmp_path):
    one = record.place(tmp_path / "runs", "abc123", tree(), resume="auto")
    assert one.config.is_file() and one.id == "abc123"
    assert one.tree() == tree()
    assert (tmp_path / "runs" / ".gitignore").read_text() == "*\n"
    assert record.place(tmp_path / "runs", "abc123", tree(), resume="auto") == one

    again = [record.place(tmp_path / "runs", "abc123", tree(), resume="never").id for _ in range(2)]
    assert again == ["abc123.2", "abc123.3"]
    assert one.config.is_file(), "nothing is deleted"


def test_a_place_that_cannot_be_written(tree, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="run.root") as refused:
        record.place(tmp_path / "file" / "runs", "abc123", tree(), resume="auto")
    assert refused.value.problems[0].fix


@pytest.fixture
def three(tree, tmp_path):
    for number, identity in enumerate(("abc111", "abd222", "eee333")):
        run = record.place(tmp_path, identity, tree(), resume="auto")
        os.utime(run.config, (number, number))
    return tmp_path


def test_finding(three):
    found = lambda *words: [run.id for run in record.find(three, list(words))]  # noqa: E731
    assert found() == ["abc111", "abd222", "eee333"]
    assert found("abc") == ["abc111"]
    assert found("e", "abd222") == ["eee333", "abd222"]
    assert found("latest") == ["eee333"]


def test_a_whole_id_is_never_ambiguous(three, tree):
    record.place(three, "abc111", tree(), resume="never")
    assert [run.id for run in record.find(three, ["abc111"])] == ["abc111"]


def test_what_is_not_found_is_refused_all_at_once(three):
    with pytest.raises(Refused) as refused:
        record.find(three, ["ab", "zzz", "abc111"])
    assert [problem.value for problem in refused.value.problems] == ["ab", "zzz"]
    assert "2 runs" in refused.value.problems[0].why
    assert "no runs" in refused.value.problems[1].why
    with pytest.raises(Refused):
        record.find(three / "nowhere", ["latest"])


def test_states(tree, tmp_path):
    run = record.place(tmp_path, "abc111", tree(), resume="auto")
    assert run.state() == "new" and run.result() is None
    record.write_json(run.environment, {})
    assert run.state() == "interrupted", "it was started, and nothing says how it ended"
    for status in record.FINAL:
        run.finish(status, step=3)
        assert run.state() == status
        assert run.result()["step"] == 3


def test_a_run_is_running_while_a_process_holds_its_lock(tree, tmp_path):
    run = record.place(tmp_path, "abc111", tree(), resume="auto")
    record.write_json(run.environment, {})
    code = f"import filelock, time; lock = filelock.FileLock({str(run.lock_file)!r}); lock.acquire(); "
    code += "print('held', flush=True); "
    holder = subprocess.Popen(
        [sys.executable, "-c", code + "time.sleep(60)"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        run.finish("failed")
        assert run.state() == "running", "whatever an earlier attempt left"
        assert run.running() and run.running(), "asking takes no lock away"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert run.state() == "failed", "locks die with their process"
    finally:
        holder.kill()
        holder.wait()
    with FileLock(run.lock_file, timeout=1):
        pass


def test_metrics_without_the_line_that_a_crash_cut(tree, tmp_path):
    run = record.place(tmp_path, "abc111", tree(), resume="auto")
    assert run.lines() == []
    run.metrics.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert run.lines() == [{"step": 1}, {"step": 2}]


def test_the_last_checkpoint_by_number(tree, tmp_path):
    run = record.place(tmp_path, "abc111", tree(), resume="auto")
    assert run.last_checkpoint() is None
    for name in ("checkpoint-9", "checkpoint-10", ".checkpoint-11", ".partial/checkpoint-12"):
        (run.checkpoints / name).mkdir(parents=True)
    assert run.last_checkpoint().name == "checkpoint-10"


def test_damaged_files_are_named(tree, tmp_path):
    run = record.place(tmp_path, "abc111", tree(), resume="auto")
    run.result_file.write_text("{")
    with pytest.raises(RecordError, match=r"result\.json"):
        run.result()
    run.config.write_text("a: ${nothing}\n")
    with pytest.raises(RecordError, match=r"config\.yaml"):
        run.tree()
    run.config.write_text("a: [\n")
    with pytest.raises(RecordError, match=r"config\.yaml"):
        run.tree()


def test_the_environment_has_versions_and_no_secrets(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    found = record.environment()
    assert found["packages"]["torch"] and found["source"] == record.source_hash()
    assert "very-secret" not in json.dumps(found)


def test_a_run_folder_has_one_name_for_each_file(tmp_path):
    run = Run(tmp_path / "abc")
    names = [path.name for path in (run.config, run.plan, run.environment, run.effective, run.metrics)]
    names += [path.name for path in (run.checkpoints, run.model, run.result_file)]
    documented = "config.yaml plan.json env.json effective.json metrics.jsonl checkpoints model result.json"
    assert names == documented.split()
    assert not run.exists()
    assert time.strptime(record.now(), "%Y-%m-%dT%H:%M:%S+00:00")
