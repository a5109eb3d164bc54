"""Tokenised once: found again, made by one of many, and never half there."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import soup.data.encode
from soup.data.prepare import lengths, prepare

ROOT = Path(__file__).parents[2]
ROWS = [{"instruction": f"Say {n}.", "output": f"{n} it is."} for n in range(40)]


def stamps(folder):
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.iterdir()}


def entries(cache):
    return [
        path for path in (cache / "tokenised").iterdir() if path.is_dir() and not path.name.startswith(".")
    ]


def test_the_second_call_does_not_tokenise(arguments, monkeypatch):
    given = arguments(ROWS)
    first = prepare(**given)
    before = stamps(first["train"].folder)

    def poisoned(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(soup.data.encode.Encoder, "encode_batch", poisoned)
    monkeypatch.setattr(soup.data.encode.TokenizerFiles, "load", poisoned)
    assert prepare(**given) == first
    assert lengths(**given)["train"] == first["train"].report
    assert stamps(first["train"].folder) == before
    with pytest.raises(AssertionError, match="tokenised again"):
        prepare(**given | {"max_length": 100})


def test_a_failed_attempt_leaves_no_entry(arguments, tmp_path, monkeypatch):
    given = arguments(ROWS)

    def broken(*_):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("soup.data.account.summarise", broken)
        with pytest.raises(MemoryError):
            prepare(**given)
    assert entries(tmp_path / "cache") == []
    assert prepare(**given)["train"].report.rows == 40


def _prepare(given, barrier, answers):
    barrier.wait()
    made = prepare(**given)["train"]
    answers.put((str(made.folder), made.open().stat().st_ino, made.report.rows))


def test_concurrent_writers_make_one_entry(arguments, tmp_path):
    given = arguments(ROWS)
    spawn = multiprocessing.get_context("spawn")
    barrier, answers = spawn.Barrier(3), spawn.Queue()
    children = [spawn.Process(target=_prepare, args=(given, barrier, answers)) for _ in range(3)]
    for child in children:
        child.start()
    found = {answers.get(timeout=60) for _ in children}
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert len(found) == 1 and len(entries(tmp_path / "cache")) == 1


SLOW = """
import json, sys, time
from pathlib import Path
import soup.data.account, soup.data.prepare
given = json.loads(sys.argv[1])
given["model_folder"], given["cache"] = Path(given["model_folder"]), Path(given["cache"])
real = soup.data.account.summarise
def slow(*arguments):
    print("written", flush=True)
    time.sleep(60)
    return real(*arguments)
soup.data.account.summarise = slow
soup.data.prepare.prepare(**given)
"""


def test_a_killed_writer_leaves_nothing_that_counts(arguments, tmp_path):
    """Killed between the writing of the rows and the rename; the next one waits for no lock."""
    given = arguments(ROWS)
    plain = json.dumps(given | {"model_folder": str(given["model_folder"]), "cache": str(given["cache"])})
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, plain],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert child.stdout.readline() == b"written\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    partial = [path for path in (tmp_path / "cache" / "tokenised").iterdir() if path.is_dir()]
    assert partial and entries(tmp_path / "cache") == []
    start = time.monotonic()
    made = prepare(**given)["train"]
    assert time.monotonic() - start < 20 and made.report.rows == 40
    assert entries(tmp_path / "cache") == [made.folder]


def test_num_proc_is_the_number_of_threads(arguments):
    """In a fresh process, since the tokenizer's thread pool is made once."""
    code = (
        "import json, os, sys; from pathlib import Path; from soup.data.prepare import lengths\n"
        "given = json.loads(sys.argv[1]); given['model_folder'] = Path(given['model_folder'])\n"
        "before = len(os.listdir('/proc/self/task')); lengths(**given)\n"
        "print(len(os.listdir('/proc/self/task')) - before, os.environ.get('RAYON_NUM_THREADS'))"
    )
    env = {name: value for name, value in os.environ.items() if name != "RAYON_NUM_THREADS"}
    env |= {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    env |= {"TOKENIZERS_PARALLELISM": "true"}
    for number in (1, 3):
        given = arguments(ROWS, num_proc=number)
        plain = json.dumps(given | {"model_folder": str(given["model_folder"]), "cache": str(given["cache"])})
        done = subprocess.run(
            [sys.executable, "-c", code, plain], capture_output=True, text=True, env=env, check=True
        )
        assert done.stdout.split() == [str(number), "None"]


def test_nothing_heavy_is_imported(arguments):
    code = (
        "import json, sys; from pathlib import Path\n"
        "import soup.data.prepare, soup.data.show, soup.data.read, soup.data.formats\n"
        "slow = ('pyarrow', 'tokenizers', 'jinja2', 'numpy', 'filelock', 'huggingface_hub')\n"
        "late = [m for m in slow if m in sys.modules]\n"
        "given = json.loads(sys.argv[1]); given['model_folder'] = Path(given['model_folder'])\n"
        "made = soup.data.prepare.prepare(**given)\n"
        "encoder = soup.data.encode.Encoder(\n"
        "    given['model_folder'], chat_template=None, max_length=9, on_too_long='skip')\n"
        "soup.data.show.show(made['train'], encoder, 1, soup.data.show.Console(file=sys.stderr))\n"
        "heavy = [m for m in ('torch', 'transformers', 'trl', 'peft', 'datasets') if m in sys.modules]\n"
        "print(json.dumps([late, heavy]))"
    )
    given = arguments(ROWS)
    plain = json.dumps(given | {"model_folder": str(given["model_folder"]), "cache": str(given["cache"])})
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, plain], capture_output=True, text=True, env=env, check=True
    )
    assert json.loads(done.stdout) == [[], []]
