"""The full product of the groups' choices: each point plans, or is refused by a rule that has a fix."""

import itertools
import json
from pathlib import Path

import pytest
import yaml

from soup import rules
from soup.device import Device
from soup.errors import Problem, Refused
from soup.plan import Lengths, plan
from soup.schema import GROUPS, SECTIONS, check, merge_arguments

CONF = Path(__file__).parent.parent / "conf"
LLAMA = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
LENGTHS = Lengths(
    rows=100, mean=50, p50=50, p95=60, max=64, tokens=5000, learnt=2500, sampled=False, eval_rows=0
)
PLANNED = ("model", "data", "task", "backend", "lora", "optim", "distributed", "longctx")


def node(group, choice):
    read = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text()) or {}
    if group == "longctx" and choice != "none":
        read["rope_factor"] = 2.0
    for name in {"short_factor", "long_factor"} & set(read):
        read[name] = [1.0] * 8
    return read | {"base": "org/model"} if read.get("base") == "???" else read


def choices(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def sections():
    read = yaml.safe_load((CONF / "config.yaml").read_text())
    return {section: read[section] for section in SECTIONS}


@pytest.fixture(scope="module")
def specs(sections):
    """(group, choice) to the spec of that choice: each function is called once, through the schema."""
    first = {group: "none" if "none" in choices(group) else choices(group)[0] for group in GROUPS}
    found = {}
    for group in GROUPS:
        for choice in choices(group):
            tree = {g: node(g, c) for g, c in (first | {group: choice}).items()} | sections
            found[group, choice] = (getattr(check(tree), group), tree[group])
    return found


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_point_plans_or_is_refused_with_a_fix(device, specs, sections):
    """Groups that the plan reads in full product; tracking and launch, which it does not, beside one point each."""
    from dataclasses import replace

    first = {group: choices(group)[0] for group in GROUPS}
    base = check({g: node(g, c) for g, c in first.items()} | sections)
    machine = Device(kind=device, bf16=device == "cuda", reason="test")
    planned = refused = 0
    for combination in itertools.product(*(choices(group) for group in PLANNED)):
        chosen = dict(zip(PLANNED, combination, strict=True))
        tree = dict(base.tree) | {group: specs[group, choice][1] for group, choice in chosen.items()}
        parts = {group: specs[group, choice][0] for group, choice in chosen.items()}
        config = replace(base, tree=tree, **parts)
        problems = rules.broken(rules.facts(config, device=device, model_config=LLAMA))
        if problems:
            refused += 1
            assert all(isinstance(p, Problem) and p.why and p.fix for p in problems)
            continue
        merge_arguments(config)
        try:
            found = plan(config, model=LLAMA, device=machine, lengths=LENGTHS)
        except Refused as refusal:  # GaLore's default rank is above this small model's width
            refused += 1
            assert [p.key for p in refusal.problems] == ["optim.galore_rank"]
            continue
        planned += 1
        assert found.peak_memory_bytes > 0 and found.steps > 0 and found.disk_bytes > 0
        assert found.trainable > 0
    assert planned > 1000 and refused > 1000


@pytest.mark.parametrize("group", ["tracking", "launch"])
def test_tracking_and_launch_meet_no_rule_but_their_own(group, sections):
    for choice in choices(group):
        tree = {g: node(g, choices(g)[0]) for g in GROUPS} | {group: node(group, choice)} | sections
        found = rules.facts(check(tree), device="cpu", model_config=LLAMA)
        about = [rule for rule in rules.RULES if any(key.startswith(group) for key in rule.when)]
        assert all(rule.key.startswith(f"{group}.") or rule.key == "distributed.nodes" for rule in about)
        assert json.dumps({key: found[key] for rule in about for key in rule.when if key in found})
