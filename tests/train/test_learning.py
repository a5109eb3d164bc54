"""Each task learns: its own measure moves the right way by a stated margin, with adapters and with all weights."""

from __future__ import annotations

import json

import pytest

PROMPTS = ["How do I boil an egg?", "Is the lamp lit?", "What does the keeper write?", "def add(a, b):"]
GOOD, BAD = "The lamp is lit.", "Count six and a half minutes"
RATES = {"lora": ("optim.lr=1e-2",), "none": ("lora=none", "optim.lr=2e-3")}
STEPS = (
    "training.max_steps=40",
    "training.logging_steps=1",
    "training.batch_size=4",
    "optim.scheduler=constant",
)
# The measure in metrics.jsonl, and by how much its last five values must exceed (or, if negative, fall below) the
# first five on average.
MEASURES = {
    "sft": ("loss", -0.6),
    "pretrain": ("loss", -0.6),
    "dpo": ("rewards/margins", 1.0),
    "ipo": ("loss", -5.0),
    "kto": ("loss", -0.1),
    "orpo": ("rewards/margins", 0.1),
    "simpo": ("rewards/margins", 1.0),
    "reward": ("loss", -0.3),
}


@pytest.fixture
def rows(tmp_path):
    """A file of the task's shape, in which the one answer is always better than the other."""

    def written(task):
        made = {
            "sft": [{"prompt": prompt, "completion": GOOD} for prompt in PROMPTS],
            "pretrain": [{"text": f"{prompt} {GOOD}"} for prompt in PROMPTS],
            "kto": [
                {"prompt": prompt, "completion": answer, "label": answer == GOOD}
                for prompt in PROMPTS
                for answer in (GOOD, BAD)
            ],
            "grpo": [{"prompt": prompt} for prompt in PROMPTS],
        }
        pairs = [{"prompt": prompt, "chosen": GOOD, "rejected": BAD} for prompt in PROMPTS]
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in made.get(task, pairs) * 4))
        return f"data.train={file}"

    return written


def averages(run, measure):
    values = [line[measure] for line in run.lines() if measure in line]
    assert len(values) >= 10, f"{measure} is not among {sorted(run.lines()[-1])}"
    return sum(values[:5]) / 5, sum(values[-5:]) / 5


@pytest.mark.parametrize("lora", RATES)
@pytest.mark.parametrize("task", MEASURES)
def test_it_learns(tree, place, server, rows, task, lora):
    run = place(tree(f"task={task}", rows(task), *STEPS, *RATES[lora]))
    process = server(run)
    assert process.wait() == 0, process.stdout.read()
    measure, margin = MEASURES[task]
    before, after = averages(run, measure)
    print(f"{measure}: {before:.3f} to {after:.3f}")
    assert (after - before) / margin >= 1


@pytest.fixture
def letters(tmp_path, rows):
    """GRPO with the share of small letters as its reward."""
    (tmp_path / "reward.py").write_text(
        "def letters(prompts, completions, **_):\n"
        "    return [sum(letter.islower() for letter in text) / max(1, len(text)) for text in completions]\n"
    )
    return (
        "task=grpo",
        rows("grpo"),
        f"task.rewards=[{tmp_path / 'reward.py'}:letters]",
        "task.num_generations=8",
        "task.max_completion_length=16",
        *STEPS,
        "training.batch_size=16",
    )


@pytest.mark.slow
def test_grpo_earns_more_and_stays_near_its_reference(tree, place, server, letters):
    """With a strong pull to the reference the policy moves less."""
    runs = {}
    for beta in (0.01, 2.0):
        runs[beta] = place(tree(*letters, *RATES["none"], f"task.beta={beta}"), f"beta{beta}")
        process = server(runs[beta])
        assert process.wait() == 0, process.stdout.read()
    before, after = averages(runs[0.01], "reward")
    assert after - before > 0.1
    free, held = (averages(runs[beta], "kl")[1] for beta in (0.01, 2.0))
    assert held < free / 2


@pytest.mark.slow
def test_grpo_earns_more_with_adapters(tree, place, server, letters):
    """On so small a random model adapters move little of what is sampled: more steps, a smaller margin."""
    more = ("training.max_steps=100", "training.logging_steps=10", "optim.lr=1e-2", "lora.alpha=64")
    run = place(tree(*letters, *more))
    process = server(run)
    assert process.wait() == 0, process.stdout.read()
    rewards = [line["reward"] for line in run.lines() if "reward" in line]
    assert sum(rewards[-3:]) / 3 - sum(rewards[:2]) / 2 > 0.02
