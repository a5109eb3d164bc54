"""Runs on rows beyond the model's own context: they learn, resume bit for bit, and leave a model that is scaled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from soup.errors import Refused

OWN, LONG = 32, 128
KINDS = ("linear", "dynamic", "yarn", "llama3", "longrope")
LISTS = ("longctx.short_factor=[1,1,1,1,1,1,1,2]", "longctx.long_factor=[1,1,2,3,4,4,4,4]")


@pytest.fixture(scope="module")
def short(tiny_model, tmp_path_factory):
    """The tiny model, made for 32 tokens."""
    folder = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": OWN}))
    return folder


@pytest.fixture
def wrong():
    """The effects that are not in force, by key."""

    def mismatches(built):
        from soup import effects

        return {effect.key: effect for effect in effects.prove(built) if not effect.ok}

    return mismatches


@pytest.fixture
def stretched(short):
    """Overrides that stretch it."""

    def words(kind, *others):
        lists = LISTS if kind == "longrope" else ()
        return (f"model.base={short}", f"data.max_length={LONG}", f"longctx={kind}", *lists, *others)

    return words


def logits(model, tokens=100):
    import torch

    model = model.float().eval()
    with torch.no_grad():
        return model(torch.arange(3, 3 + tokens)[None]).logits


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_stopped_run_goes_on_bit_for_bit(server, place, tree, unequal, stretched, kind, stop_at):
    """Batches of one row, some within the model's own length: the kinds whose frequencies follow it."""
    tree = tree(
        *stretched(kind, "training.batch_size=1", "training.max_steps=8", "training.save_steps=4"),
        "training.logging_steps=1",
        "training.eval_steps=2",
        "optim.lr=5e-3",
    )
    whole, stopped = place(tree, "whole"), place(tree, "stopped")
    process = server(whole)
    assert process.wait() == 0, process.stdout.read()
    assert server(stopped, code=stop_at(3)).wait() == 130
    assert server(stopped).wait() == 0
    assert unequal(whole, stopped) == []
    proved = json.loads(whole.effective.read_text())
    assert proved["longctx.rope_factor"]["effective"] == LONG / OWN
    assert [key for key, one in proved.items() if not one["ok"]] == []


@pytest.mark.parametrize("lora", ["lora", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_scaled(build, place, tree, stretched, tmp_path, kind, lora):
    """Learns in three steps, and the folder gives with plain transformers or PEFT what the trained model gives."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from soup.model.merge import merge
    from soup.train.finish import save_model

    words = stretched(
        kind,
        f"lora={lora}",
        "model.dtype=float32",
        "training.max_steps=3",
        "optim.lr=1e-2",
        "training.logging_steps=1",
    )
    built = build(*words)
    built.trainer.metrics_file = tmp_path / "metrics.jsonl"
    built.trainer.train()
    run = place(tree(*words))
    save_model(run, built, {"step": 3})
    trained = logits(built.model)
    short_rows = logits(built.model, OWN - 1)  # transformers goes back below the own length only
    card = (run.model / "README.md").read_text()
    assert f"{kind} rotary scaling by 4, from {OWN} to {LONG} tokens" in card
    assert AutoTokenizer.from_pretrained(run.model).model_max_length >= LONG
    if lora == "none":
        saved = AutoModelForCausalLM.from_pretrained(run.model)
    else:
        scaled = json.loads((run.model / "base_config.json").read_text())
        assert "base_config.json" in card and ", **scaled)" in card
        saved = AutoPeftModelForCausalLM.from_pretrained(run.model, **scaled)
        without = AutoPeftModelForCausalLM.from_pretrained(run.model)
        assert (logits(without) - trained).abs().max() > 1e-4, "which is why the card says so"
        merge(run.model, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.allclose(logits(merged), trained, atol=1e-4)
        assert merged.config.rope_parameters["rope_type"] == kind
    assert torch.equal(logits(saved), trained)
    assert torch.equal(logits(saved, OWN - 1), short_rows)
    text = saved.config.get_text_config()
    assert text.rope_parameters["rope_type"] == kind and text.rope_parameters["factor"] == 4.0
    assert text.max_position_embeddings == (OWN if kind == "dynamic" else LONG)


@pytest.fixture(scope="module")
def scorer(short, tmp_path_factory):
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("scorer") / "model"
    config = AutoConfig.from_pretrained(short, num_labels=1)
    config.max_position_embeddings = LONG + 8
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", ["lora", "none"])
def test_ppo_stretches_the_policy_and_its_reference(build, wrong, stretched, scorer, monkeypatch, lora):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    words = ("task=ppo", f"task.reward_model={scorer}", "task.response_length=8", f"lora={lora}")
    built = build(*stretched("yarn", *words))
    assert wrong(built) == {}
    if lora == "none":
        monkeypatch.setattr("soup.train.extra.scaling", lambda *_: None)
        assert "longctx.rope_scaling_type" in wrong(build(*stretched("yarn", *words)))


def test_ppo_with_scorers_that_reach_less_far_is_refused(compose, stretched, short, scorer):
    from soup.rope import scorers_fit
    from soup.schema import check

    def fits(folder):
        words = ("task=ppo", f"task.reward_model={folder}", "task.response_length=8")
        scorers_fit(check(compose("model=hub", *stretched("yarn", *words))))

    fits(scorer)
    fits("/nowhere")
    with pytest.raises(Refused, match="reaches 32 tokens, and a prompt with its answer may have 136"):
        fits(short)


def test_a_reward_adapter_scores_with_the_scaling_that_it_learnt_with(
    build, place, tree, stretched, tmp_path
):
    import torch

    from soup.train.extra import _scorer
    from soup.train.finish import save_model

    words = stretched(
        "dynamic", "task=reward", "model.dtype=float32", "training.max_steps=2", "optim.lr=1e-2"
    )
    built = build(*words)
    built.trainer.metrics_file = tmp_path / "metrics.jsonl"
    built.trainer.train()
    run = place(tree(*words))
    save_model(run, built, {"step": 2})
    scorer = _scorer(
        "task.reward_model", str(run.model), 600, torch.float32, False, attention=lambda _: "sdpa"
    )
    trained = built.model
    assert torch.allclose(logits(scorer), logits(trained), atol=1e-4)
    (run.model / "base_config.json").unlink()
    plain = _scorer(
        "task.reward_model", str(run.model), 600, torch.float32, False, attention=lambda _: "sdpa"
    )
    assert not torch.allclose(logits(plain), logits(trained), atol=1e-4)


def test_scaling_changes_what_is_learnt_from_long_rows(build, stretched):
    losses = {}
    for kind in KINDS:
        words = ("training.max_steps=1", "training.logging_steps=1", "training.batch_size=2")
        built = build(*stretched(kind, *words))
        built.trainer.metrics_file = Path(built.trainer.args.output_dir, "metrics.jsonl")
        built.trainer.train()
        losses[kind] = built.trainer.state.log_history[0]["loss"]
    assert len(set(losses.values())) == len(KINDS), losses
