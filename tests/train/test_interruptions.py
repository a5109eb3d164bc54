"""A run that was killed, stopped or orphaned equals the run that was left alone, bit for bit.

Training takes seconds and starting takes most of them, so one run lives through many interruptions.
"""

from __future__ import annotations

import random
import signal
import time

import pytest

ADAPTERS = (
    "lora.dropout=0.1",
    "training.gradient_accumulation_steps=2",
    "training.max_steps=30",
    "training.save_steps=4",
    "training.eval_steps=7",
    "training.logging_steps=3",
    "optim.lr=1e-2",
)
ALL_WEIGHTS = (
    "lora=none",
    "training.max_steps=24",
    "training.save_steps=5",
    "training.eval_steps=10",
    "training.logging_steps=1",
    "optim.lr=1e-3",
    "optim.weight_decay=0.1",
    "data.max_samples=50",  # 13 steps an epoch, the last of two rows
)
PARENT = (
    "import sys; from soup.cli.process import train; from soup.record import Run; from pathlib import Path; "
)
PARENT += "train(Run(Path(sys.argv[1])))"
SECRET = "0123456789abcdef" * 2 + "deadbeef"  # of the form of a wandb key


class Interruptions:
    """Ways to end the training process of `run`; each starts one, and returns once it is gone.

    `fork` starts it quickly, `start` as soup does.
    """

    def __init__(self, run, fork, start, until):
        self.run, self.fork, self.start, self.until = run, fork, start, until
        seed = random.randrange(2**32)
        self.random = random.Random(seed)
        print(f"interruptions drawn from seed {seed}")

    def at(self, number, *, times=1):
        """Sends the signal once a step drawn at random has been logged; returns the exit status."""
        target = self.random.randint(self.saved() + 1, min(self.saved() + 8, 23))
        process = self.fork(self.run)
        self.reached(process, target)
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.01)
        status = process.wait(60)
        print(f"signal {number} at step {target}, {self.checkpoints()} are there")
        return status

    def reached(self, process, step):
        """Waits until the process has logged the step; lines that a killed one left do not count."""
        before = self.proved()
        self.until(process, lambda: self.proved() != before)
        self.until(process, lambda: max((line["step"] for line in self.run.lines()), default=0) >= step)

    def proved(self):
        return self.run.effective.stat().st_mtime_ns if self.run.effective.exists() else 0

    def saved(self):
        last = self.run.last_checkpoint()
        return int(last.name.rpartition("-")[2]) if last else 0

    def while_saving(self):
        """SIGKILL in the middle of a checkpoint's write; returns the checkpoints that were visible then."""
        for _ in range(5):
            process = self.fork(self.run)
            self.until(process, (self.run.checkpoints / ".partial").exists, every_s=0.001)
            process.kill()
            process.wait(60)
            if (self.run.checkpoints / ".partial").exists():
                print(f"killed while saving after step {self.saved()}")
                return self.checkpoints()
        pytest.fail("no checkpoint's write was hit")

    def orphan(self):
        """SIGKILL of the parent, whose terminal goes away with it."""
        parent = self.start(self.run, python=("-c", PARENT))
        self.reached(parent, self.saved() + 1)
        parent.stdout.close()
        parent.kill()
        parent.wait(60)
        end = time.monotonic() + 60
        while self.run.running():
            assert time.monotonic() < end, "the child outlived its parent"
            time.sleep(0.01)

    def early(self):
        """SIGTERM while libraries are still being imported."""
        process = self.start(self.run)
        self.until(process, self.run.running)
        process.send_signal(signal.SIGTERM)
        return process.wait(60)

    def checkpoints(self):
        return sorted(path.name for path in self.run.checkpoints.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def alone(tree, place_below, server, tmp_path_factory):
    """Runs that nothing interrupts, trained once: `alone(ADAPTERS)`."""
    trained = {}

    def run(overrides):
        if overrides not in trained:
            trained[overrides] = place_below(tmp_path_factory.mktemp("alone"), tree(*overrides))
            process = server(trained[overrides])
            assert process.wait() == 0, process.stdout.read()
        return trained[overrides]

    return run


def test_adapters(alone, tree, place, server, start, train, until, unequal, whole, metrics):
    """Dropout, accumulation and evaluation, through a kill, a kill while saving, SIGINT and a parent's death."""
    undisturbed = alone(ADAPTERS)
    run = place(tree(*ADAPTERS))
    happens = Interruptions(run, server, start, until)

    assert happens.at(signal.SIGKILL) == -signal.SIGKILL
    assert run.state() == "interrupted"

    visible = happens.while_saving()
    assert whole(run) == visible, "what was being written is not to be seen"

    assert happens.at(signal.SIGINT) == 130
    assert run.state() == "interrupted"
    stopped = run.result()
    assert (stopped["status"], stopped["error"]) == ("interrupted", "stopped by SIGINT")
    assert f"checkpoint-{stopped['step']}" in whole(run), "it saved where it stopped"

    happens.orphan()
    assert run.state() == "interrupted"
    assert run.result()["error"] == "stopped by SIGTERM"
    assert f"checkpoint-{run.result()['step']}" in whole(run)

    status, shown = train(run)
    assert status == 0, shown
    assert run.state() == "finished"
    assert "resuming from checkpoint-" in shown
    assert unequal(undisturbed, run) == []
    logged = metrics(run)
    assert [line["step"] for line in logged if "loss" in line] == list(range(3, 31, 3))
    assert [line["step"] for line in logged if "eval_loss" in line] == [7, 14, 21, 28, 30]
    assert len(whole(run)) == 2, "older checkpoints are gone"
    assert not (run.checkpoints / ".partial").exists()


@pytest.mark.slow
def test_all_weights(alone, tree, place, server, start, until, unequal, whole):
    """Epochs that end within the run, through SIGTERM while libraries load, a kill while saving, two SIGINTs and
    SIGTERM; with trackers, which are no part of what is trained."""
    undisturbed = alone(ALL_WEIGHTS)
    run = place(tree(*ALL_WEIGHTS, "tracking=[tensorboard,wandb]", "tracking.wandb.mode=offline"))
    assert run.id == undisturbed.id
    happens = Interruptions(run, lambda run: server(run, WANDB_API_KEY=SECRET), start, until)

    assert happens.early() == 130
    assert (run.state(), happens.checkpoints(), run.lines()) == ("interrupted", [], [])

    visible = happens.while_saving()
    assert whole(run) == visible

    assert happens.at(signal.SIGINT, times=2) == 130
    assert run.state() == "interrupted"

    assert happens.at(signal.SIGTERM) == 130
    assert run.result()["error"] == "stopped by SIGTERM"

    last = server(run, WANDB_API_KEY=SECRET)
    assert last.wait() == 0, last.stdout.read()
    assert unequal(undisturbed, run) == []
    kept = ("loss", "lr", "grad_norm", "tokens", "eval_loss")
    assert tensorboard_of(run, kept) == {
        (key, line["step"]): line[key] for line in run.lines() for key in kept if key in line
    }
    offline = [path for path in (run.folder / "wandb").glob("offline-run-*") if path.is_dir()]
    assert {path.name.rpartition("-")[2] for path in offline} == {run.id}, "one run for the tracker as well"
    for path in run.folder.rglob("*"):
        assert not (path.is_file() and SECRET.encode() in path.read_bytes()), f"{path} has the key"


TASK = (
    "training.max_steps=24",
    "training.save_steps=3",
    "training.eval_steps=10",
    "training.logging_steps=2",
    "training.gradient_accumulation_steps=2",
    "data.max_samples=20",
    "optim.lr=1e-3",
)
TASKS = {
    "dpo": ("task.label_smoothing=0.1",),
    "ipo": ("task.precompute_ref=true",),
    "kto": (),
    "orpo": (),
    "simpo": (),
    "reward": (),
    "grpo": ("task.max_completion_length=8", "task.beta=0.1"),
}
QUICK = {("dpo", "none")}


@pytest.fixture
def twice_interrupted(alone, tree, place, server, start, until, unequal, whole):
    """Trains a run through SIGKILL and SIGTERM, and compares it with the one that was left alone."""

    def trained(words):
        undisturbed = alone(words)
        run = place(tree(*words))
        happens = Interruptions(run, server, start, until)
        assert happens.at(signal.SIGKILL) == -signal.SIGKILL
        assert happens.at(signal.SIGTERM) == 130
        whole(run)
        last = server(run)
        assert last.wait() == 0, last.stdout.read()
        assert unequal(undisturbed, run) == []

    return trained


@pytest.mark.parametrize(
    ("task", "lora"),
    [
        pytest.param(task, lora, marks=() if (task, lora) in QUICK else pytest.mark.slow)
        for task in TASKS
        for lora in ("lora", "none")
    ],
)
def test_every_task_twice_interrupted(twice_interrupted, task, lora):
    """Over several epochs, with what each trainer keeps between two logs."""
    words = (f"task={task}", f"lora={lora}", *TASK, *TASKS[task])
    twice_interrupted(words)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sft", "grpo"])
def test_noise_twice_interrupted(twice_interrupted, task):
    twice_interrupted((f"task={task}", "training.neftune_alpha=5.0", *TASK, *TASKS.get(task, ())))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_curriculum_twice_interrupted(twice_interrupted, task):
    """Three steps an epoch: the first epoch's order and the later ones'."""
    words = (f"task={task}", "training.curriculum=true", "training.curriculum_buckets=3", *TASK)
    twice_interrupted((*words, *TASKS.get(task, ())))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("training.curriculum_metric=loss",),
        ("training.packing=true", "data.max_length=400"),
        ("training.packing=true", "training.curriculum_metric=loss", "task=pretrain", "data.max_length=60"),
    ],
    ids=["loss", "packed", "pretrain, packed by loss"],
)
def test_other_curricula_twice_interrupted(twice_interrupted, words):
    twice_interrupted(("training.curriculum=true", "training.curriculum_buckets=3", *TASK, *words))


@pytest.mark.slow
def test_muon_twice_interrupted(twice_interrupted):
    twice_interrupted(("optim=muon", "optim.lr=1e-2", "lora=none", *TASK))


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["lora", "none"])
def test_ppo_twice_interrupted(twice_interrupted, scorer, lora):
    words = ("task=ppo", f"task.reward_model={scorer}", "task.response_length=8", f"lora={lora}", *TASK)
    twice_interrupted(words)


@pytest.mark.slow
def test_ppo_with_noise_twice_interrupted(twice_interrupted, scorer):
    ppo = ("task=ppo", f"task.reward_model={scorer}", "task.response_length=8")
    twice_interrupted((*ppo, "training.neftune_alpha=5.0", *TASK))


def tensorboard_of(run, tags):
    """(tag, step) to value, as TensorBoard shows them; each step once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    shown = {}
    for tag in tags:
        for event in events.Scalars(tag):
            assert (tag, event.step) not in shown, f"{tag} of step {event.step} is shown twice"
            shown[tag, event.step] = pytest.approx(event.value, rel=1e-6)
    return shown


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [ADAPTERS, ALL_WEIGHTS], ids=["adapters", "all weights"])
def test_many_kills(alone, tree, place, server, start, until, unequal, whole, overrides):
    undisturbed = alone(overrides)
    run = place(tree(*overrides))
    happens = Interruptions(run, server, start, until)
    for number in range(24):
        if happens.saved() >= 19:  # near the end: once more from the start
            assert server(run).wait() == 0
            assert unequal(undisturbed, run) == []
            run = happens.run = place(tree(*overrides), f"runs{number}")
        if number % 3 == 2:
            visible = happens.while_saving()
            assert whole(run) == visible
        else:
            happens.at(happens.random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM]))
        whole(run)
    assert server(run).wait() == 0
    assert unequal(undisturbed, run) == []
