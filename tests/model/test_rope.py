"""Rotary scaling: what follows from lengths, what is refused, and its being in force in each architecture."""

from __future__ import annotations

import json
import shutil

import pytest

from soup import rope
from soup.errors import Refused
from soup.rope import scaling
from soup.schema import check

LLAMA = {
    "model_type": "llama",
    "max_position_embeddings": 512,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "rope_theta": 10000.0,
}
LONGROPE = (
    "longctx=longrope",
    "longctx.short_factor=[1,1,1,1,1,1,1,2]",
    "longctx.long_factor=[1,1,2,3,4,4,4,4]",
)
SMALL = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
OWN = {
    "gemma3_text": LAYERS,
    "olmo3": LAYERS,
    "mixtral": {"num_local_experts": 4, "head_dim": None},
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
}
COMMON = ("llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma2", "gemma3_text", "gpt_neox", "phi3")
KINDS = ("linear", "dynamic", "yarn", "llama3", "longrope")
QUICK = (
    ("gemma3_text", "dynamic"),
    ("gemma3_text", "longrope"),
    ("phi3", "longrope"),
    ("mixtral", "dynamic"),
)
BEYOND = ("data.max_length=300",)  # of a model's own 128


def asked(compose, *words, model=None):
    return scaling(check(compose(*words)), LLAMA | (model or {}))


def test_the_factor_follows_from_the_lengths(compose):
    assert asked(compose, "longctx=none", "data.max_length=2048") is None
    found = asked(compose, "longctx=yarn", "data.max_length=2048")
    assert (found.factor, found.own, found.length, found.positions) == (4.0, 512, 2048, 2048)
    assert asked(compose, "longctx=dynamic", "data.max_length=2048").positions == 512
    generating = asked(
        compose, "longctx=linear", "task=grpo", "data.max_length=768", "task.max_completion_length=256"
    )
    assert (generating.factor, generating.length) == (2.0, 1024)


def test_a_given_factor_is_used_as_given(compose):
    found = asked(compose, "longctx=linear", "longctx.rope_factor=3.0", "data.max_length=64")
    assert (found.factor, found.length) == (3.0, 1536)
    assert asked(compose, "longctx=linear", "longctx.rope_factor=3.0", "data.max_length=1536").length == 1536


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_a_scaled_model_is_scaled_anew_where_it_says_from_where(compose, kind):
    extra = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}, "yarn": {}}[kind]
    now = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 128, **extra}
    found = asked(compose, f"longctx={kind}", "data.max_length=1024", model={"rope_scaling": now})
    assert (found.factor, found.own, found.length) == (8.0, 128, 1024)


SCALED = {"rope_scaling": {"type": "linear", "factor": 2.0}}
REFUSED = {
    "nothing to scale": (
        ("longctx=yarn", "data.max_length=512"),
        {},
        "longctx.rope_factor",
        "no factor follows",
    ),
    "beyond": (
        ("longctx=yarn", "longctx.rope_factor=2.0", "data.max_length=1025"),
        {},
        "data.max_length",
        "beyond the 1024 tokens",
    ),
    "generated beyond": (
        ("longctx=yarn", "longctx.rope_factor=2.0", "task=grpo", "data.max_length=1000"),
        {},
        "data.max_length",
        "generated tokens is beyond the 1024",
    ),
    "no rotary embedding": (
        ("longctx=yarn", "data.max_length=1024"),
        {"model_type": "gpt2", "rope_theta": None},
        rope.KEY,
        "no rotary embedding",
    ),
    "unknown": (("longctx=yarn", "data.max_length=1024"), {"model_type": "new"}, rope.KEY, "not proved"),
    "pictures": (
        ("longctx=yarn", "data.max_length=1024"),
        {"model_type": "gemma3", "text_config": {}},
        rope.KEY,
        "text and more",
    ),
    "scaled": (("longctx=yarn", "data.max_length=1024"), SCALED, rope.KEY, "scales by linear already"),
    "scaled, the same": (("longctx=linear", "data.max_length=1024"), SCALED, rope.KEY, "scales by linear"),
    "scaled with more": (
        ("longctx=yarn", "data.max_length=1024"),
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 2.0,
                "mscale": 1.0,
                "original_max_position_embeddings": 9,
            }
        },
        rope.KEY,
        "scales by yarn already",
    ),
    "phi3": (
        ("longctx=yarn", "data.max_length=1024"),
        {"model_type": "phi3"},
        rope.KEY,
        "no scaling but longrope",
    ),
    "gemma3": (
        ("longctx=longrope", "data.max_length=1024"),
        {"model_type": "gemma3_text"},
        rope.KEY,
        "second long",
    ),
    "told to reach less than it was made for": (
        ("longctx=yarn", "data.max_length=1024"),
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}},
        "longctx.rope_factor",
        "fits in the 2048",
    ),
    "no factors": (
        ("longctx=longrope", "data.max_length=1024"),
        {},
        "longctx.short_factor",
        r"none are given",
    ),
    "too few": (
        (*LONGROPE, "longctx.long_factor=[1,2]", "data.max_length=1024"),
        {},
        "longctx.long_factor",
        "8 freq",
    ),
    "crossed": (
        ("longctx=llama3", "longctx.low_freq_factor=4.0", "data.max_length=1024"),
        {},
        "longctx.low_freq_factor",
        "must be less",
    ),
    "no length": (
        ("longctx=yarn", "data.max_length=1024"),
        {"max_position_embeddings": None},
        rope.KEY,
        "max_position_embeddings",
    ),
    "one frequency": (
        ("longctx=dynamic", "data.max_length=1024"),
        {"head_dim": 2},
        rope.KEY,
        "one frequency",
    ),
}


@pytest.mark.parametrize(("words", "model", "key", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_scaled_is_refused(compose, words, model, key, why):
    with pytest.raises(Refused, match=why) as refused:
        asked(compose, *words, model=model)
    assert key in [problem.key for problem in refused.value.problems]


def test_a_dynamically_scaled_model_reaches_further_than_it_says():
    assert rope.context(LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 3.0}}) == 1536
    assert rope.context(LLAMA) == 512
    assert rope.context({}) is None


@pytest.fixture(scope="module")
def architecture(model_folder, tmp_path_factory):
    """A folder with a small random model of an architecture, and its own length of 128."""
    made = {}

    def folder(name):
        if name not in made:
            import torch
            from transformers import CONFIG_MAPPING, AutoModelForCausalLM

            with torch.random.fork_rng():
                torch.manual_seed(0)
                settings = SMALL | OWN.get(name, {})
                if name in ("phi3", "gpt_neox"):
                    settings = {key: value for key, value in settings.items() if key != "head_dim"}
                model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**settings))
            made[name] = tmp_path_factory.mktemp("architecture") / "model"
            shutil.copytree(model_folder, made[name])
            model.save_pretrained(made[name])
        return made[name]

    return folder


def words_for(kind, pairs):
    if kind != "longrope":
        return [f"longctx={kind}"]
    numbers = [1 + n / pairs for n in range(pairs)]
    return ["longctx=longrope", f"longctx.short_factor={[1.0] * pairs}", f"longctx.long_factor={numbers}"]


def pairs():
    for name in rope.ROTARY:
        for kind in KINDS:
            quick = name == "llama" or (name in COMMON and kind == "yarn") or (name, kind) in QUICK
            yield pytest.param(name, kind, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "kind"), pairs())
def test_it_is_in_force_in_every_architecture(architecture, build, name, kind):
    from soup import effects
    from soup.effects.rope import rotary

    folder = architecture(name)
    pairs = rope.frequencies(json.loads((folder / "config.json").read_text()))
    words = (f"model.base={folder}", "lora.target_modules=[q_proj]", *BEYOND, *words_for(kind, pairs))
    words += ("lora=none",) if name in ("phi3", "gpt_neox", "persimmon", "phi") else ()
    words = [word for word in words if "lora=none" not in words or not word.startswith("lora.")]
    refused = (name == "phi3" and kind != "longrope") or (name in rope.BY_LAYER and kind == "longrope")
    if refused:
        with pytest.raises(Refused):
            build(*words)
        return
    built = build(*words)
    found = {effect.key: effect for effect in effects.prove(built)}
    assert [one for one in found.values() if not one.ok] == []
    assert found["longctx.rope_scaling_type"].effective == kind
    assert found["longctx.rope_factor"].effective == 300 / 128
    assert {len(getattr(module, f"{prefix}inv_freq")) for _, module, prefix in rotary(built.model)} == {pairs}
