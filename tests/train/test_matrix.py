"""The space of settings: every pair that no rule refuses trains two steps with every effect proved.

A pairwise covering array over the settings that can work together; the rules prune while it is made, as they know
nothing of what is not chosen yet. The default run takes a sample, `make test-all` all of it.
"""

from __future__ import annotations

import itertools
import json
import random
from functools import cache
from pathlib import Path

import pytest
import yaml
from covertable import make

from soup import rules

CONF = Path(__file__).parents[2] / "conf"
SEED, SAMPLE = 7, 10
TASKS = ("sft", "pretrain", "dpo", "ipo", "kto", "orpo", "simpo", "reward", "grpo", "ppo")
SPACE = (
    [f"task={task}" for task in TASKS],
    ["optim=adamw", "optim=adamw_8bit", "optim=adafactor", "optim=lion", "optim=schedule_free", "optim=muon"]
    + ["optim=galore optim.galore_rank=8 optim.galore_update_proj_gap=1"],
    ["lora=lora", "lora=dora lora.target_modules=[q_proj,down_proj]", "lora=rslora lora.dropout=0.1"]
    + ["lora=loraplus lora.r=4", "lora=none"],
    [f"model.quantization={held} model.quantization_aware=false" for held in ("none", "4bit", "8bit")]
    + ["model.quantization=4bit model.quantization_aware=true"]
    + ["model.quantization=8bit model.quantization_aware=true model.quantization_group_size=16"],
    ["model.dtype=auto", "model.dtype=bfloat16", "model.dtype=float32"],
    ["training.gradient_checkpointing=false", "training.gradient_checkpointing=true"],
    ["training.packing=false", "training.packing=true"],
    ["training.use_flash_attn=auto", "training.use_flash_attn=off"],
    ["training.neftune_alpha=0.0", "training.neftune_alpha=5.0"],
    ["training.freeze_layers=0", "training.freeze_layers=1", "training.freeze_ratio=0.5"],
    ["training.loss_watchdog=false", "training.loss_watchdog=true training.loss_watchdog_action=rollback"],
    ["training.curriculum=false", "training.curriculum=true training.curriculum_buckets=3"]
    + ["training.curriculum=true training.curriculum_metric=loss"],
    ["training.gradient_accumulation_steps=1", "training.gradient_accumulation_steps=2"],
    ["training.max_grad_norm=1.0", "training.max_grad_norm=0.0"],
    ["training.max_steps=2", "training.max_steps=null training.epochs=0.1"],
    ["data.max_length=128", "data.max_length=320 data.on_too_long=skip"],
    ["data.streaming=false", "data.streaming=true"],
    ["distributed=none", "distributed=ddp", "distributed=zero3", "distributed=fsdp_full_shard"],
    ["longctx=none"]
    + [f"longctx={kind} longctx.rope_factor=4.0" for kind in ("linear", "dynamic", "yarn", "llama3")],
    ["longctx.use_ring_attention=false", "longctx.use_ring_attention=true longctx.ring_size=2"],
)


@cache
def read(word):
    """The facts that one override gives."""
    key, _, value = word.partition("=")
    path = CONF / key / f"{value}.yaml"
    if not path.is_file():
        return {key: yaml.safe_load(value)}
    node = yaml.safe_load(path.read_text())
    return {f"{key}.{leaf}": inner for leaf, inner in node.items()} | {key: node["name"]}


def defaults():
    """Facts of what the space leaves alone."""
    whole = yaml.safe_load((CONF / "config.yaml").read_text())
    found = {f"training.{leaf}": value for leaf, value in whole["training"].items()}
    for word in ("model=hub", "data=auto", "backend=transformers", "distributed=none"):
        found |= read(word)
    chosen = {word.partition("=")[0] for values in SPACE for value in values for word in value.split()}
    found = {key: value for key, value in found.items() if key not in chosen}
    return found | {"device": "cpu", "model.moe": False, "training.batch_size": 4}


DEFAULTS = defaults()


def facts(words):
    """What rules look at, of settings some of which are not chosen yet."""
    found = dict(DEFAULTS)
    for word in " ".join(words).split():
        found |= read(word)
    world = found["distributed.processes"] * found["distributed.nodes"]
    if "distributed" in found:  # else there is no world yet
        found["longctx.whole_rings"] = world % found.get("longctx.ring_size", 1) == 0
    return found | {"task.reward_model": "a folder", "distributed.world": world}


def constraints():
    """Each rule as a condition over the settings that it speaks about."""
    gives = [set().union(*(read(word) for value in values for word in value.split())) for values in SPACE]
    for rule in rules.RULES:
        needed = [number for number, keys in enumerate(gives) if keys & set(rule.when)]
        free = cache(lambda *words, rule=rule: not rule.holds(facts(words)))
        if needed:
            yield {
                "operator": "fn",
                "requires": needed,
                "evaluate": lambda row, needed=needed, free=free: free(*(row[number] for number in needed)),
            }


POINTS = [tuple(point) for point in make(list(SPACE), constraints=list(constraints()))]
CHOSEN = set(random.Random(SEED).sample(range(len(POINTS)), SAMPLE))


def test_every_pair_that_can_work_is_there():
    for one, other in itertools.combinations(SPACE, 2):
        for pair in itertools.product(one, other):
            known = facts(pair)
            allowed = not rules.broken(known)
            assert allowed == any(set(pair) <= set(point) for point in POINTS), pair


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(point, marks=() if number in CHOSEN else pytest.mark.slow, id=f"{number}")
        for number, point in enumerate(POINTS)
    ],
)
def test_it_trains_with_every_effect_proved(tree, place, server, several, scorer, point):
    words = " ".join(point).split()
    if "task=ppo" in words:
        words += [f"task.reward_model={scorer}", "task.response_length=8"]
    if "task=grpo" in words:
        words += ["task.max_completion_length=8"]
    run = place(tree(*words))
    process = server(run) if "distributed=none" in words else several(run, 2)
    assert process.wait() == 0, process.stdout.read()
    assert run.state() == "finished"
    wrong = {key: one for key, one in json.loads(run.effective.read_text()).items() if not one["ok"]}
    assert wrong == {}
