"""A stream trains on what the files hold, epoch after epoch; interrupted and resumed it is the same to the bit."""

from __future__ import annotations

import json
import signal

import pytest

ROWS = 23  # fewer than the run draws, and no multiple of a batch: it crosses epochs in the middle of one
STREAM = ("data.streaming=true", "training.max_steps=14", "training.save_steps=3", "training.logging_steps=1")


@pytest.fixture
def rows(tmp_path):
    def written(name="rows.jsonl", number=ROWS, bad_at=None):
        file = tmp_path / name
        lines = [
            json.dumps({"instruction": f"Add {n} in {name}.", "output": f"{n * n}."}) for n in range(number)
        ]
        if bad_at is not None:
            lines[bad_at] = "{"
        file.write_text("\n".join(lines))
        return file

    return written


def interrupted_at(run, server, until, step, number):
    process = server(run)
    until(process, lambda: max((line["step"] for line in run.lines()), default=0) >= step, every_s=0.002)
    process.send_signal(number)
    assert process.wait() in (130, -signal.SIGKILL)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_over_several_epochs(tree, place, server, until, unequal, rows):
    words = (
        *STREAM,
        f"data.train=[{rows()},{rows('more.jsonl', 40)}]",
        "data.weights=[2,1]",
        f"data.eval={rows('eval.jsonl', 5)}",
        "training.max_steps=30",
        "training.gradient_accumulation_steps=2",
        "lora.dropout=0.1",
        "optim.lr=1e-2",
    )
    alone, run = place(tree(*words), "alone"), place(tree(*words), "often")
    assert server(alone).wait() == 0, alone.log_tail()
    interrupted_at(run, server, until, 5, signal.SIGKILL)  # in the second epoch, of 34 rows
    interrupted_at(run, server, until, 13, signal.SIGINT)
    interrupted_at(run, server, until, 20, signal.SIGKILL)
    assert server(run).wait() == 0, run.log_tail()
    assert unequal(alone, run) == []
    effective = json.loads(run.effective.read_text())
    assert effective["data.streaming"]["effective"] is True
    assert "23 of" in effective["data.weights"]["how"], "the smaller share ends with the larger"
    run.result_file.unlink()  # killed between the last checkpoint and the result
    assert server(run).wait() == 0
    assert unequal(alone, run) == []


def test_one_epoch_learns_the_rows_that_are_stored_without_a_stream(tree, place, server, metrics, rows):
    """All rows fit one batch, so that their order does not matter: the same loss at every step."""
    words = (f"data.train={rows(number=4)}", "training.max_steps=6", "training.logging_steps=1")
    runs = [place(tree(*words, f"data.streaming={on}")) for on in ("true", "false")]
    assert runs[0].id != runs[1].id
    for run in runs:
        assert server(run).wait() == 0, run.log_tail()
    losses = [[line["loss"] for line in metrics(run)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("task", ["pretrain", "dpo", "simpo", "orpo", "kto", "reward"])
@pytest.mark.slow
def test_each_task_streams_and_resumes(tree, place, server, until, unequal, task):
    words = (*STREAM, f"task={task}", "data.max_samples=15", "training.gradient_accumulation_steps=2")
    alone, run = place(tree(*words), "alone"), place(tree(*words), "often")
    assert server(alone).wait() == 0, alone.log_tail()
    interrupted_at(run, server, until, 4, signal.SIGKILL)
    interrupted_at(run, server, until, 8, signal.SIGINT)
    assert server(run).wait() == 0, run.log_tail()
    assert unequal(alone, run) == []


@pytest.mark.slow
def test_a_bad_row_that_comes_late_fails_the_run_with_file_and_row(tree, place, server, rows):
    file = rows(number=2200, bad_at=2100)
    run = place(tree(*STREAM, f"data.train={file}", "training.max_steps=90", "training.batch_size=16"))
    process = server(run)
    assert process.wait() == 2
    shown = process.stdout.read()
    result = run.result()
    assert result["status"] == "failed"
    assert f"{file}:2101: malformed JSON" in result["error"] and "data.on_bad_row=skip" in result["error"]
    assert f"{file}:2101" in shown and "Traceback" not in shown
    assert run.last_checkpoint() is not None, "what was learnt before is there"


@pytest.mark.slow
def test_a_row_that_is_too_long_fails_or_is_skipped(tree, place, server, rows):
    file = rows(number=2100)
    with file.open("a") as lines:
        lines.write("\n" + json.dumps({"instruction": "a", "output": "long " * 300}))
    words = (*STREAM, f"data.train={file}", "training.max_steps=90", "training.batch_size=16")
    run = place(tree(*words, "data.on_too_long=refuse"))
    assert server(run).wait() == 2
    assert f"{file}:2101" in run.result()["error"] and "data.on_too_long" in run.result()["error"]
