"""PPO's knobs show in an update of TRL's loop, in which nothing is learnt and nothing drawn."""

from __future__ import annotations

import contextlib

import pytest

KNOBS = (
    "task.response_length=8",
    "task.temperature=0.8",
    "task.kl_coef=0.4",
    "task.gamma=0.9",
    "task.lam=0.7",
    "task.cliprange=0.1",
    "task.vf_coef=0.3",
    "task.num_ppo_epochs=3",
)
BUILDS = {
    "adapters": (),
    "all weights": ("lora=none",),
    "bfloat16": ("model.dtype=bfloat16",),
    "noise": ("training.neftune_alpha=15.0",),
    "stretched": ("longctx=yarn", "longctx.rope_factor=4.0"),
    "recomputed": ("training.gradient_checkpointing=true",),
}


@pytest.fixture
def ppo(build, scorer, monkeypatch):
    # TRL says with each import from trl.experimental that it may change.
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def built(*words):
        return build("task=ppo", f"task.reward_model={scorer}", f"task.value_model={scorer}", *KNOBS, *words)

    return built


@pytest.mark.parametrize("name", BUILDS)
def test_each_knob_shows_in_the_loss(ppo, wrong, name):
    import numpy as np
    import torch

    from soup.effects.ppo import FORMULA, update

    built = ppo(*BUILDS[name])
    weights = [p.detach().clone() for p in built.trainer.model.parameters()]
    drawn = torch.get_rng_state(), np.random.get_state()[1].copy()
    modes = [module.training for module in built.trainer.model.modules()]
    said = {effect.key: effect for effect in update(built)}
    for knob in FORMULA:
        assert said[f"task.{knob}"].ok and f"with another {knob} it would be" in said[f"task.{knob}"].how
    assert wrong(built) == {}
    assert all(map(torch.equal, weights, built.trainer.model.parameters()))
    assert torch.equal(drawn[0], torch.get_rng_state()) and (drawn[1] == np.random.get_state()[1]).all()
    assert modes == [module.training for module in built.trainer.model.modules()]
    assert built.trainer.state.global_step == 0 and not built.trainer.state.log_history


@pytest.mark.parametrize(
    ("knob", "value"),
    [("kl_coef", 0.0), ("gamma", 1.0), ("lam", 0.95), ("cliprange", 0.2), ("vf_coef", 0.1)]
    + [("temperature", 0.7), ("response_length", 9), ("num_ppo_epochs", 4)],
)
def test_an_argument_that_got_lost_is_seen(ppo, wrong, knob, value):
    built = ppo()
    setattr(built.trainer.args, knob, value)
    assert f"task.{knob}" in wrong(built)


def unwhitened(monkeypatch):
    monkeypatch.setattr("trl.experimental.ppo.ppo_trainer.masked_whiten", lambda values, *_, **__: values)


def without_reference(monkeypatch):
    """Adapters stay on while the reference is asked."""
    monkeypatch.setattr(
        "trl.experimental.ppo.PPOTrainer.null_ref_context", lambda _: contextlib.nullcontext()
    )


def scores_of_the_prompt(monkeypatch):
    import trl.experimental.ppo.ppo_trainer as module

    real = module.get_reward

    def early(model, ids, pad, context):
        values, scores, lengths = real(model, ids, pad, context)
        return values, values[:, 0, 0], lengths

    monkeypatch.setattr(module, "get_reward", early)


@pytest.mark.parametrize("sabotage", [unwhitened, without_reference, scores_of_the_prompt])
def test_another_algorithm_is_seen(ppo, wrong, monkeypatch, sabotage):
    built = ppo()
    sabotage(monkeypatch)
    assert "task.name" in wrong(built)
