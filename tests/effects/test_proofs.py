"""Which probes speak about which key, on real builds of every choice: docs/proofs.json, for docs/settings.md.

`make docs` writes the file anew (SOUP_WRITE_PROOFS=1).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "docs" / "proofs.json"
LORA = ["lora=lora", "lora=dora", "lora=rslora", "lora=loraplus"]
TASKS = ["sft", "pretrain", "dpo", "ipo", "kto", "orpo", "simpo", "reward", "grpo", "ppo"]
OPTIMIZERS = ["adamw_8bit", "adafactor", "lion", "schedule_free", "muon"]
ONES = ",".join(["1.0"] * 8)  # as many as the tiny model has frequencies
LONG = f"longctx=longrope longctx.short_factor=[{ONES}] longctx.long_factor=[{ONES}]"
SCALINGS = ["longctx=linear", "longctx=yarn", "longctx=llama3", LONG]
EMBEDDED = Path(__file__).parents[2] / "soup" / "embedded"
MIX = f"data.train=[{EMBEDDED}/keeper.jsonl,{EMBEDDED}/keeper_eval.jsonl] data.weights=[3,1]"
AWARE = "model.quantization=4bit model.quantization_aware=true"
WORDS = (
    [f"task={task}" for task in TASKS]
    + [f"optim={optimizer}" for optimizer in OPTIMIZERS]
    + ["optim=galore optim.galore_rank=8 lora=none", "training.curriculum=true", "training.packing=true"]
    + ["training.loss_watchdog=true", "model.quantization=4bit", AWARE, MIX, *LORA[1:]]
    + [f"{words} longctx.rope_factor=4.0" for words in SCALINGS]
)
ABOUT: dict[str, dict[str, None]] = {}


@pytest.mark.parametrize("words", WORDS)
def test_what_is_said_of_each_key(build, scorer, words, monkeypatch):
    from soup import effects

    monkeypatch.setenv(
        "TRL_EXPERIMENTAL_SILENCE", "1"
    )  # TRL's PPO warns of changes, and warnings are errors here
    given = words.split()
    if words == "task=ppo":
        given += [f"task.reward_model={scorer}", f"task.value_model={scorer}", "task.response_length=8"]
    for name, effect in effects.spoken(build(*given)):
        assert effect.ok, effect
        ABOUT.setdefault(effect.key, {})[name] = None


def test_what_is_said_of_several_processes(build):
    """By a group of one: how long it would wait is the group's own."""
    from datetime import timedelta

    import torch.distributed as dist

    from soup.effects import distributed

    built = build("distributed=ddp", "distributed.timeout_s=77")
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=77)
    )
    try:
        for effect in distributed.patience(built):
            assert effect.ok, effect
            ABOUT.setdefault(effect.key, {})["distributed:patience"] = None
    finally:
        dist.destroy_process_group()


def test_the_table_of_proofs_is_current():
    if len(WORDS) > 1 and "optim.galore_rank" not in ABOUT:
        pytest.skip("needs the builds of this file, all of them")
    found = {key: sorted(names) for key, names in sorted(ABOUT.items())}
    if os.environ.get("SOUP_WRITE_PROOFS"):
        FILE.write_text(json.dumps(found, indent=1) + "\n")
    assert json.loads(FILE.read_text()) == found, "make docs"
