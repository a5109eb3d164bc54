"""The fork server: its children are as isolated as new processes, and none outlives it."""

import json
import os
import select
import signal
import time
from pathlib import Path

import pytest

from soup.cli.loader import launcher
from soup.cli.process import variables

STEPS = ("training.logging_steps=1", "training.max_steps=3")
LONG = ("training.logging_steps=1", "training.max_steps=5000", "training.save_steps=1000")
PATCH = """
import sys
if "transformers" in sys.modules:
    from transformers.models.llama import modeling_llama
    modeling_llama.LlamaMLP.forward = lambda self, x: x * 0
    import torch
    torch.set_num_threads(3)
    torch.manual_seed(5)
def one(prompts, completions, **columns):
    return [float(len(str(completion)) % 3) for completion in completions]
"""

# Notes who has transformers' classes in the process that trains, and whether Unsloth is in it; `{liger}`: before that
# Liger takes them over. (Its modules are there in any case: TRL imports them.)
LOOK = """
import json, sys
if "transformers" in sys.modules:
    from transformers.models.llama import modeling_llama
    if {liger}:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
        apply_liger_kernel_to_llama()
    parts = list(vars(modeling_llama).values())
    parts += [part for one in parts if isinstance(one, type) for part in vars(one).values()]
    owners = {{str(getattr(part, "__module__", None)).partition(".")[0] for part in parts}}
    owners &= {{"liger_kernel", "unsloth", "unsloth_zoo"}}
    print(json.dumps([sorted(owners), "unsloth" in sys.modules]), file=open("{seen}", "a"))
def one(prompts, completions, **columns):
    return [float(len(str(completion)) % 3) for completion in completions]
"""


def _forked(folder, *words):
    launcher("local")
    from hydra_plugins.soup_launchers._servers import Forked

    return Forked(variables(1), list(words), folder / "server.txt")


def _ready(server, log):
    while server.able is None:
        select.select(server.descriptors(), [], [], 1)
        list(server.ended())
    assert server.able, log.read_text()
    return server


def _statuses(server, count, timeout_s=120):
    """Exit status by run id, of the next runs that end."""
    found, end = {}, time.monotonic() + timeout_s
    while len(found) < count:
        assert time.monotonic() < end
        select.select(server.descriptors(), [], [], 1)
        found |= dict(server.ended())
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    server = _ready(_forked(folder), folder / "server.txt")
    yield server
    server.close()


def test_what_one_run_patches_does_not_reach_the_next(server, tree, place, tmp_path, losses):
    (tmp_path / "patch.py").write_text(PATCH)
    reward = f"task.rewards=[{tmp_path}/patch.py:one]"
    before, patched = place(tree(*STEPS), "before"), place(tree("task=grpo", reward, *STEPS), "patched")
    after = place(tree(*STEPS), "after")
    for run, status in ((before, 0), (patched, 1), (after, 0)):
        server.start(run, {})
        assert _statuses(server, 1) == {run.id: status}, run.console.read_text()
    assert "backend.kernels=auto: did not take effect" in patched.result()["error"], "a class was patched"
    assert losses(before) == losses(after)


def test_ligers_kernels_stay_in_the_child_that_took_them(server, tree, place, tmp_path):
    for name, liger in (("liger", True), ("stock", False)):
        (tmp_path / f"{name}.py").write_text(LOOK.format(liger=liger, seen=tmp_path / "seen"))
        words = ("task=grpo", f"task.rewards=[{tmp_path}/{name}.py:one]", "training.max_steps=1")
        run = place(tree(*words), name)
        server.start(run, {})
        assert _statuses(server, 1) == {run.id: int(liger)}, run.console.read_text()
    first, second = map(json.loads, (tmp_path / "seen").read_text().splitlines())
    assert first == [["liger_kernel"], False], "Liger's are in force"
    assert second == [[], False], "the next child has the stock ones"


@pytest.mark.slow
def test_what_unsloth_does_for_one_run_does_not_reach_the_next(tree, place, tmp_path, losses):
    """Unsloth rewrites classes for what it loads: here for a run of all weights, between two equal ones of adapters."""
    server = _ready(_forked(tmp_path, "--unsloth", "cpu"), tmp_path / "server.txt")
    try:
        words = ("backend=unsloth", *STEPS)
        before, after = place(tree(*words), "before"), place(tree(*words), "after")
        for run in (before, place(tree(*words, "lora=none"), "other"), after):
            server.start(run, {})
            assert _statuses(server, 1) == {run.id: 0}, run.console.read_text()
        assert losses(before) == losses(after)
    finally:
        server.close()


def test_a_child_is_a_process_with_its_own_environment_and_one_thread_pool(server, tree, place, tmp_path):
    (tmp_path / "look.py").write_text(
        "import json, os, sys\n"
        "if 'torch' in sys.modules:\n"
        "    import torch\n"
        "    json.dump([os.getpid(), os.getppid(), os.environ['SOUP_SWEEP'], torch.get_num_threads(),\n"
        "               torch.cuda.is_initialized(), sys.modules['deepspeed']],\n"
        f"              open('{tmp_path}/seen', 'w'))\n"
        "def one(prompts, completions, **columns): return [0.0] * len(prompts)\n"
    )
    run = place(tree("task=grpo", f"task.rewards=[{tmp_path}/look.py:one]", "training.max_steps=1"))
    server.start(run, {"SOUP_SWEEP": "abc"})
    assert _statuses(server, 1) == {run.id: 0}
    pid, parent, swept, threads, cuda, deepspeed = json.loads((tmp_path / "seen").read_text())
    assert (parent, swept, threads, cuda) == (server.process.pid, "abc", 1, False)
    assert deepspeed is None, "accelerate imports it to unwrap a model"
    assert pid != parent
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    names = {path.read_text().strip() for path in Path(f"/proc/{parent}/task").glob("*/comm")}
    assert names <= {"python", "jemalloc_bg_thd"}, "a pool of threads does not survive a fork"
    assert len(list(Path(f"/proc/{parent}/task").iterdir())) <= 2


def test_a_run_that_is_held_elsewhere_is_left_alone(server, tree, place):
    from filelock import FileLock

    run = place(tree(*STEPS))
    with FileLock(run.lock_file):
        server.start(run, {})
        assert _statuses(server, 1) == {run.id: 75}
    assert run.result() is None


def test_a_child_that_dies_takes_none_with_it(server, tree, place, until):
    killed, other = place(tree(*LONG), "killed"), place(tree(*STEPS), "other")
    server.start(killed, {})
    until(killed.lines)
    server.start(other, {})
    (pid,) = [
        int(path.name)
        for path in Path("/proc").glob("[0-9]*")
        if _opens(path, str(killed.folder / "log.txt"))
    ]
    os.kill(pid, signal.SIGKILL)
    assert _statuses(server, 2) == {killed.id: -signal.SIGKILL, other.id: 0}
    assert killed.state() == "interrupted" and other.state() == "finished"


def _opens(process, file):
    try:
        return os.readlink(process / "fd/1") == file
    except OSError:
        return False


@pytest.mark.slow
def test_the_end_of_the_server_is_a_request_to_save(tree, place, tmp_path, until):
    server = _forked(tmp_path)
    try:
        run = place(tree(*LONG))
        server.start(run, {})  # answered once it has imported
        until(run.lines)
        server.process.kill()
        assert _statuses(server, 1) == {run.id: -signal.SIGKILL}
        assert server.able is False
        until(lambda: not run.running())
        assert run.state() == "interrupted"
        assert run.last_checkpoint() is not None
    finally:
        server.close()
