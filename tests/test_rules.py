"""The rules are data: what they speak about exists, what they advise exists, and each can hold and be escaped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from soup import rules, schema
from soup.rules.rule import Above, Not, OneOf, Rule
from soup.schema import GROUPS, SECTIONS

CONF = Path(__file__).parents[1] / "conf"
FACTS = {
    "device": ("cpu", "cuda"),
    "model.moe": (False, True),
    "model.balanced": (False, True),
    "lora.names_experts": (True,),
    "task.whole_groups": (False,),
    "distributed.world": (1,),
    "launch.gpus_fit": (False,),
    "longctx.whole_rings": (False,),
    "task.weighed": (False,),
    "data.weighed": (False,),
}
NEVER = object()


def read(group, choice):
    return yaml.safe_load((CONF / group / f"{choice}.yaml").read_text()) or {}


def leaves():
    """Every key of every choice to its values in the YAML."""
    found = {}
    for group in GROUPS:
        for path in (CONF / group).glob("*.yaml"):
            node = read(group, path.stem)
            for name, value in node.items():
                if isinstance(value, dict):
                    for leaf, inner in value.items():
                        found.setdefault(f"{group}.{name}.{leaf}", []).append(inner)
                else:
                    found.setdefault(f"{group}.{name}", []).append(value)
    whole = yaml.safe_load((CONF / "config.yaml").read_text())
    for section in SECTIONS:
        found |= {f"{section}.{leaf}": [value] for leaf, value in whole[section].items()}
    return found


LEAVES = leaves()
NAMES = {group: {path.stem for path in (CONF / group).glob("*.yaml")} for group in GROUPS}
FUNCTIONS = {group: set(schema._functions(group)) for group in GROUPS}
KNOWN = {*LEAVES, *GROUPS, *FACTS, *(f"tracking.{name}" for name in FUNCTIONS["tracking"])}
every = pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.condition())


@every
def test_it_says_why_and_what_to_do(rule):
    assert rule.why and rule.fix and rule.when
    assert not rule.why.endswith(".")


@every
def test_what_it_speaks_about_exists(rule):
    assert set(rule.when) <= KNOWN
    assert rule.key in KNOWN, "the key to blame"


@every
def test_the_choices_it_names_exist(rule):
    for key, condition in rule.when.items():
        if key in GROUPS:
            named = condition.values if isinstance(condition, Not | OneOf) else (condition,)
            assert set(named) <= FUNCTIONS[key], "a bare group stands for the function"
        if key in FACTS:
            assert condition in FACTS[key]


@every
def test_the_keys_it_advises_exist(rule):
    for word in re.findall(r"([a-z_][\w.]*)=", rule.fix):
        assert word in KNOWN, f"{word} in: {rule.fix}"


@every
def test_it_can_hold_and_every_condition_matters(rule):
    meets = {key: _meeting(condition) for key, condition in rule.when.items()}
    assert rule.holds(meets)
    assert str(rule.problem(meets)).startswith(rule.key)
    for key, condition in rule.when.items():
        assert not rule.holds({**meets, key: _escaping(condition)})
        assert not rule.holds({k: v for k, v in meets.items() if k != key}), "an unknown fact matches nothing"


def _meeting(condition):
    if isinstance(condition, Not):
        return "anything" if "anything" not in condition.values else "else"
    if isinstance(condition, OneOf):
        return condition.values[-1]
    return condition.bound + 1 if isinstance(condition, Above) else condition


def _escaping(condition):
    if isinstance(condition, Not):
        return condition.values[0]
    return condition.bound if isinstance(condition, Above) else NEVER


@pytest.mark.parametrize(
    "rule",
    [rule for rule in rules.RULES if rule.why.startswith("nothing reads it while")],
    ids=lambda rule: rule.condition(),
)
def test_idle_keys_are_compared_with_the_default_of_the_yaml(rule):
    (switch, off), (key, condition) = rule.when.items()
    assert all(value == condition.values[0] for value in LEAVES[key])
    assert all(value == off for value in LEAVES[switch])


def test_the_default_configuration_breaks_no_rule(tree):
    for device in ("cpu", "cuda"):
        found = rules.facts(schema.check(tree()), device=device, model_config={"model_type": "llama"})
        assert rules.broken(found) == []


MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8}
REFUSED = {
    "galore with an adapter": (("optim=galore",), "lora"),
    "galore, quantized": (("optim=galore", "lora=none", "model.quantization=4bit"), "model.quantization"),
    "galore with unsloth": (("optim=galore", "lora=none", "backend=unsloth"), "backend"),
    "all weights, quantized": (("lora=none", "model.quantization=8bit"), "lora"),
    "aware of no quantization": (("model.quantization_aware=true",), "model.quantization_aware"),
    "aware with unsloth": (
        ("model.quantization=4bit", "model.quantization_aware=true", "backend=unsloth"),
        "model.quantization_aware",
    ),
    "aware, DoRA with dropout": (
        ("model.quantization=4bit", "model.quantization_aware=true", "lora=dora", "lora.dropout=0.1"),
        "lora.dropout",
    ),
    "aware and sharded": (
        ("model.quantization=4bit", "model.quantization_aware=true", "distributed=zero3"),
        "model.quantization_aware",
    ),
    "groups of nothing": (("model.quantization_group_size=64",), "model.quantization_group_size"),
    "packed pairs": (("task=dpo", "training.packing=true"), "training.packing"),
    "experts of a dense model": (("training.moe_lora=true",), "training.moe_lora"),
    "a router of a dense model": (("training.moe_aux_loss_coeff=0.1",), "training.moe_aux_loss_coeff"),
    "a router without a balancing loss": (
        ("training.moe_aux_loss_coeff=0.1", {"model_type": "deepseek_v3", "n_routed_experts": 8}),
        "training.moe_aux_loss_coeff",
    ),
    "a reward model's router": (
        ("task=reward", "training.moe_aux_loss_coeff=0.1", MIXTRAL),
        "training.moe_aux_loss_coeff",
    ),
    "DoRA on experts": (("lora=dora", "training.moe_lora=true", MIXTRAL), "lora.use_dora"),
    "dropout on experts": (("lora.dropout=0.1", "training.moe_lora=true", MIXTRAL), "lora.dropout"),
    "experts by name": (("lora.target_modules=[q_proj,w1]", MIXTRAL), "lora.target_modules"),
    "a router by name": (("lora.target_modules=gate", MIXTRAL), "lora.target_modules"),
    "quantized experts": (("model.quantization=4bit", MIXTRAL), "model.quantization"),
    "experts with unsloth": (("backend=unsloth", MIXTRAL), "backend"),
    "sharded experts": (
        ("distributed=zero3", "distributed.processes=2", "training.moe_lora=true", MIXTRAL),
        "distributed",
    ),
    "several processes of one": (("distributed=zero2", "distributed.processes=1"), "distributed.processes"),
    "8-bit moments in shares": (("distributed=zero2", "optim=adamw_8bit"), "optim"),
    "factors of shares": (("distributed=fsdp_full_shard", "optim=adafactor"), "optim"),
    "two points of shares": (("distributed=fsdp_full_shard", "optim=schedule_free"), "optim"),
    "quantized and cut": (("distributed=fsdp_full_shard", "model.quantization=4bit"), "model.quantization"),
    "copies of 16 bits": (("distributed=zero2", "lora=none", "model.dtype=bfloat16"), "model.dtype"),
    "a watchdog on DeepSpeed": (
        ("distributed=zero3", "training.loss_watchdog=true"),
        "training.loss_watchdog",
    ),
    "trained weights of two dtypes": (("distributed=zero3", "task=reward"), "distributed"),
    "generating with shares": (("distributed=zero3", "task=grpo"), "distributed"),
    "frozen twice": (("training.freeze_layers=1", "training.freeze_ratio=0.5"), "training.freeze_ratio"),
    "held out twice": (("data.eval=x.jsonl", "data.eval_fraction=0.1"), "data.eval_fraction"),
    "processes of one": (("distributed.processes=2",), "distributed.processes"),
    "nodes without SLURM": (("distributed=ddp", "distributed.nodes=2"), "distributed.nodes"),
    "a ring of one": (("longctx.use_ring_attention=true",), "longctx.use_ring_attention"),
    "a GPU for a job on the CPU": (("launch=slurm", "launch.device=cpu", "launch.gpus=1"), "launch.gpus"),
    "two GPUs for one process": (("launch=slurm", "launch.gpus=2"), "launch.gpus"),
    "an idle knob": (("training.curriculum_buckets=3",), "training.curriculum_buckets"),
    "an idle knob of the watchdog": (
        ("training.loss_watchdog_action=rollback",),
        "training.loss_watchdog_action",
    ),
    "PPO without a reward": (("task=ppo",), "task.reward_model"),
    "liger on a CPU": (("training.use_liger=true",), "training.use_liger"),
    "a curriculum by a loss that is random": (
        ("task=reward", "training.curriculum=true", "training.curriculum_metric=loss"),
        "training.curriculum_metric",
    ),
    "an idle metric": (("training.curriculum_metric=loss",), "training.curriculum_metric"),
    "Muon with LoRA+": (("optim=muon", "lora=loraplus"), "lora.loraplus_lr_ratio"),
    "Muon for PPO": (("optim=muon", "task=ppo"), "optim"),
    "Muon, sharded": (("optim=muon", "distributed=zero2"), "distributed"),
    "DoRA on 8 bits": (("lora=dora", "model.quantization=8bit"), "lora.use_dora"),
    "flash attention on a CPU": (("training.use_flash_attn=v3",), "training.use_flash_attn"),
    "flash attention off with unsloth": (
        ("backend=unsloth", "training.use_flash_attn=off"),
        "training.use_flash_attn",
    ),
    "float16 on a CPU": (("model.dtype=float16",), "model.dtype"),
    "preferences with unsloth on a CPU": (("backend=unsloth", "task=dpo"), "task"),
    "packing with unsloth on a CPU": (("backend=unsloth", "training.packing=true"), "training.packing"),
    "8 bits with unsloth on a CPU": (("backend=unsloth", "model.quantization=8bit"), "model.quantization"),
    "a stream of prompts": (("task=grpo", "data.streaming=true"), "data.streaming"),
    "a stream for PPO": (("task=ppo", "data.streaming=true"), "data.streaming"),
    "a packed stream": (("data.streaming=true", "training.packing=true"), "data.streaming"),
    "a stream in easy order": (("data.streaming=true", "training.curriculum=true"), "data.streaming"),
    "a stream and a table of it": (
        ("task=dpo", "data.streaming=true", "task.precompute_ref=true"),
        "data.streaming",
    ),
    "a stream in parts": (("data.streaming=true", "distributed=ddp"), "data.streaming"),
    "a stream without an end": (("data.streaming=true", "training.max_steps=null"), "training.max_steps"),
    "a part of a stream held out": (
        ("data.streaming=true", "data.eval_fraction=0.1"),
        "data.eval_fraction",
    ),
    "weights of the embedded set": (("data.weights=[1,2]",), "data.weights"),
    "a weight of one source": (("data.train=[a.jsonl]", "data.weights=[1]"), "data.weights"),
    "a weight too few": (("data.train=[a.jsonl,b.jsonl]", "data.weights=[1]"), "data.weights"),
    "an 8-bit optimizer with unsloth on a CPU": (("backend=unsloth", "optim=adamw_8bit"), "optim"),
}


@pytest.mark.parametrize(("overrides", "key"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_work_is_refused(tree, overrides, key):
    *words, last = overrides
    words, model = (words, last) if isinstance(last, dict) else (overrides, {"model_type": "llama"})
    config = schema.check(tree(*words))
    found = rules.facts(config, device="cpu", model_config=model)
    assert key in {problem.key for problem in rules.broken(found)}


ON_A_GPU = {
    "flash attention in 32 bits": (
        ("training.use_flash_attn=v2", "model.dtype=float32"),
        "training.use_flash_attn",
    ),
    "liger with unsloth": (("training.use_liger=true", "backend=unsloth"), "training.use_liger"),
    "liger and stock kernels": (("training.use_liger=true", "backend.kernels=stock"), "training.use_liger"),
    "liger, a task without its loss": (("training.use_liger=true", "task=orpo"), "training.use_liger"),
    "liger, another number": (("training.use_liger=true", "task=kto"), "training.use_liger"),
    "liger, a table of the reference": (
        ("training.use_liger=true", "task=dpo", "task.precompute_ref=true"),
        "training.use_liger",
    ),
    "liger, conservative DPO": (
        ("training.use_liger=true", "task=dpo", "task.label_smoothing=0.1"),
        "training.use_liger",
    ),
    "liger": (("training.use_liger=true",), None),
    "flash attention": (("training.use_flash_attn=v2",), None),
    "liger, GRPO": (("training.use_liger=true", "task=grpo"), None),
}


@pytest.mark.parametrize(("overrides", "key"), ON_A_GPU.values(), ids=ON_A_GPU.keys())
def test_kernels_on_a_gpu(tree, overrides, key):
    config = schema.check(tree(*overrides))
    found = rules.facts(config, device="cuda", model_config={"model_type": "llama"})
    assert {problem.key for problem in rules.broken(found)} == ({key} if key else set())


def test_problems_come_together(tree):
    config = schema.check(tree("optim=galore", "model.quantization=4bit", "training.moe_lora=true"))
    found = rules.facts(config, device="cpu", model_config={"num_local_experts": 1})
    assert {problem.key for problem in rules.broken(found)} >= {
        "lora",
        "model.quantization",
        "training.moe_lora",
    }


def test_facts(tree):
    config = schema.check(tree("lora=dora", "tracking=[wandb,tensorboard]"))
    found = rules.facts(config, device="cuda", model_config={"num_local_experts": 8})
    assert found["lora"] == "lora" and found["lora.use_dora"] is True
    assert found["device"] == "cuda" and found["model.moe"] is True
    assert found["tracking.wandb"] == "wandb" and found["tracking.tensorboard"] == "tensorboard"
    assert "model.moe" not in rules.facts(config, device="cpu", model_config=None)


def test_why_lists_what_is_one_step_away():
    rule = Rule(key="lora", when={"optim": "galore", "lora": Not("none")}, why="x", fix="y")
    assert rule.missed({"optim": "galore", "lora": "lora"}) == 0
    assert rule.missed({"optim": "adamw", "lora": "lora"}) == 1
    assert rule.missed({"optim": "adamw", "lora": "none"}) == 2
    assert rule.missed({}) == 2


def test_conditions_read_as_people_write_them():
    rule = Rule(
        key="a",
        when={"optim": "galore", "lora": Not("none"), "x": OneOf(1, 2), "n": Above(1), "t": True, "z": None},
        why="x",
        fix="y",
    )
    assert rule.condition() == "optim=galore and lora not none and x=1|2 and n above 1 and t=true and z=null"


def test_no_rule_is_there_twice():
    assert len({rule.condition() for rule in rules.RULES}) == len(rules.RULES)
