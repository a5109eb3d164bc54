"""Sabotage of rotary scaling: each way in which a library could drop it, and the probe that sees it."""

from __future__ import annotations

import pytest

YARN = ("longctx=yarn", "longctx.rope_factor=4.0")
LISTS = ("longctx.short_factor=[1,1,1,1,1,1,1,2]", "longctx.long_factor=[1,1,2,3,4,4,4,4]")
KINDS = {
    "linear": ("longctx=linear",),
    "dynamic": ("longctx=dynamic",),
    "yarn": ("longctx=yarn",),
    "longrope": ("longctx=longrope", *LISTS),
    "llama3": ("longctx=llama3",),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def asked(kind):
    return (*KINDS[kind], "longctx.rope_factor=4.0")


def loader_that_drops(monkeypatch, name):
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained

    def deaf(*words, **given):
        given.pop(name, None)
        return real(*words, **given)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", deaf)


@kinds
def test_a_loader_that_ignores_the_configuration(build, wrong, monkeypatch, kind):
    loader_that_drops(monkeypatch, "config")
    assert {"longctx.rope_scaling_type", "longctx.rope_factor"} <= set(wrong(build(*asked(kind))))


@kinds
def test_scaling_that_comes_after_the_model_is_built(build, wrong, monkeypatch, kind):
    """The configuration says it all, and the buffers are those of before."""
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained

    def late(*words, config, **given):
        model, loaded = real(*words, **given)
        model.config.rope_parameters = config.rope_parameters
        model.config.max_position_embeddings = config.max_position_embeddings
        for module in model.modules():
            if hasattr(module, "rope_type"):
                module.config = model.config
        return model, loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", late)
    assert "longctx.rope_scaling_type" in wrong(build(*asked(kind)))


@kinds
def test_another_factor(build, wrong, monkeypatch, kind):
    from soup.model import rope

    real = rope.overrides

    def halved(text, scaling):
        found = real(text, scaling)
        found["rope_parameters"]["factor"] /= 2
        return found

    monkeypatch.setattr(rope, "overrides", halved)
    assert "longctx.rope_factor" in wrong(build(*asked(kind)))


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("longctx=yarn", "longctx.beta_fast=16.0"), "longctx.beta_fast"),
        (("longctx=yarn", "longctx.beta_slow=2.0"), "longctx.beta_slow"),
        (("longctx=llama3", "longctx.low_freq_factor=2.0"), "longctx.low_freq_factor"),
        (("longctx=llama3", "longctx.high_freq_factor=8.0"), "longctx.high_freq_factor"),
        (KINDS["longrope"], "longctx.short_factor"),
        (KINDS["longrope"], "longctx.long_factor"),
    ],
)
def test_a_parameter_that_is_not_handed_on(build, wrong, monkeypatch, words, key):
    from soup.model import rope

    real = rope.overrides
    other = {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0] * 8,
    }

    def less(text, scaling):
        found = real(text, scaling)
        found["rope_parameters"] = {
            k: v for k, v in found["rope_parameters"].items() if k != key.partition(".")[2]
        }
        found["rope_parameters"] |= {k: v for k, v in other.items() if f"longctx.{k}" == key}
        return found

    monkeypatch.setattr(rope, "overrides", less)
    assert key in wrong(build(*words, "longctx.rope_factor=4.0"))


def test_a_formula_that_is_not_the_papers(build, wrong, monkeypatch):
    from transformers import modeling_rope_utils as library

    real = library.ROPE_INIT_FUNCTIONS["yarn"]

    def unsharpened(*words, **given):
        return real(*words, **given)[0], 1.0

    monkeypatch.setitem(library.ROPE_INIT_FUNCTIONS, "yarn", unsharpened)
    assert "longctx.rope_scaling_type" in wrong(build(*YARN))


def test_sines_that_forget_the_attention_factor(build, wrong):
    built = build(*YARN)
    for module in built.model.modules():
        if hasattr(module, "attention_scaling"):
            module.attention_scaling = 1.0
    assert "longctx.rope_scaling_type" in wrong(built)


def test_frequencies_changed_later(build, wrong):
    built = build(*YARN)
    for module in built.model.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq[-1] *= 2
    assert "longctx.rope_scaling_type" in wrong(built)


def test_dynamic_scaling_that_remembers_longer_batches(build, wrong, monkeypatch):
    monkeypatch.setattr("soup.model.load.forget", lambda _model: None)
    assert "longctx.rope_scaling_type" in wrong(build(*asked("dynamic")))


def test_a_length_that_would_be_saved_wrong(build, wrong):
    built = build(*YARN)
    built.model.config.max_position_embeddings = 512
    assert "longctx.rope_scaling_type" in wrong(built)


@pytest.mark.parametrize(
    "task", ["task=dpo", "task=kto", "task=grpo task.max_completion_length=8 task.beta=0.1"], ids=str
)
def test_a_reference_without_it(build, wrong, monkeypatch, task):
    words = ("lora=none", *YARN, *task.split())
    assert wrong(build(*words)) == {}
    monkeypatch.setattr("soup.train.extra.scaling", lambda *_: None)
    monkeypatch.setattr("soup.train.build._own_reference", lambda *_: {})
    assert "longctx.rope_scaling_type" in wrong(build(*words))


@kinds
def test_proving_leaves_no_state_and_no_hook_moves(build, wrong, kind):
    import torch

    built = build(*asked(kind))

    def looked():
        modules = [m for m in built.model.modules() if hasattr(m, "inv_freq")]
        return [
            (
                {k: v.clone() for k, v in m.named_buffers(remove_duplicate=False)},
                {k: v for k, v in vars(m).items() if isinstance(v, int | float | str)},
                len(m._forward_hooks),
            )
            for m in modules
        ]

    before, generator = looked(), torch.get_rng_state()
    assert wrong(built) == {}
    assert torch.equal(generator, torch.get_rng_state())
    for (buffers, values, hooks), (later, others, held) in zip(before, looked(), strict=True):
        assert buffers.keys() == later.keys() and all(torch.equal(buffers[k], later[k]) for k in buffers)
        assert (values, hooks) == (others, held)
