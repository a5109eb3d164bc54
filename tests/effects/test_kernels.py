"""The attention that really runs, and Liger's functions on the model: sabotaged in the libraries."""

from __future__ import annotations

import functools
import shutil

import pytest

KEY = "training.use_flash_attn"


@pytest.fixture(autouse=True)
def llama_without_liger():
    """Liger patches the library for the whole process, in which soup has one run."""
    from transformers.models.llama import modeling_llama

    before, forward = dict(vars(modeling_llama)), modeling_llama.LlamaForCausalLM.forward
    yield
    vars(modeling_llama).update(before)
    modeling_llama.LlamaForCausalLM.forward = forward


def attention(built):
    from soup.effects.kernels import attention

    return next(attention(built))


def liger(built):
    from soup.effects.kernels import liger

    return next(liger(built))


@pytest.mark.parametrize("words", [(), ("training.use_flash_attn=off", "lora=none")])
def test_it_says_what_runs_and_why(build, words):
    effect = attention(build(*words, "backend.kernels=stock"))
    why = "training.use_flash_attn=off" if words else "no CUDA device"
    assert effect.ok and effect.effective == "sdpa"
    assert effect.how == f"attention: sdpa, because {why}; the model made 2 calls of sdpa"


def test_documents_of_a_row_have_a_call_each(build):
    effect = attention(build())
    assert effect.ok and effect.effective == "soup"
    assert effect.how.startswith("attention: soup, because each document of a row has a call of its own")


def test_copies_take_it_too(build):
    effect = attention(build("task=dpo", "lora=none"))
    assert effect.ok and effect.how.endswith("ref_model made 2 calls of soup")


def test_a_loader_that_drops_the_choice(build, monkeypatch):
    import transformers

    real = transformers.AutoModelForCausalLM.from_pretrained

    @functools.wraps(real)
    def deaf(*words, **given):
        return real(*words, **given | {"attn_implementation": "eager"})

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", deaf)
    effect = attention(build())
    assert not effect.ok and effect.effective == "eager"
    assert "sdpa, because no CUDA device was chosen" in effect.how


def test_a_copy_with_another_attention(build):
    built = build("task=dpo", "lora=none")
    built.trainer.ref_model.set_attn_implementation("eager")
    assert not attention(built).ok


def test_one_layer_with_another_attention(build):
    """The configuration says sdpa; the layer has one of its own that does not."""
    from copy import copy

    built = build("backend.kernels=stock")
    layer = built.model.get_base_model().model.layers[1].self_attn
    layer.config = copy(layer.config)
    layer.config._attn_implementation_internal = "eager"
    assert built.model.config._attn_implementation == "sdpa"
    effect = attention(built)
    assert not effect.ok and effect.effective == "eager and sdpa"


def test_another_function_under_the_name(build, monkeypatch):
    from transformers.models.llama import modeling_llama

    table = modeling_llama.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(table._global_mapping, "sdpa", modeling_llama.eager_attention_forward)
    effect = attention(build("backend.kernels=stock"))
    assert not effect.ok and effect.effective == "eager"


def test_torchs_attention_under_the_name_of_soups(build, monkeypatch):
    """It would let one document see another: a build sees that and goes the stock way; later it is a mismatch."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    built = build()
    assert attention(built).ok
    monkeypatch.setitem(AttentionInterface._global_mapping, "soup", sdpa_attention_forward)
    assert not attention(built).ok
    part = next(part for part in build().kernels if part.name == "documents")
    assert part.count == 0 and "does not keep documents of one row apart" in part.why


def test_probing_leaves_no_profiler(build):
    import sys

    built = build()
    mode = built.model.training
    attention(built)
    assert sys.getprofile() is None and built.model.training is mode


def test_an_attention_that_no_class_has(build, wrong, model_folder, tmp_path):
    """Bloom's own is eager in transformers, which is chosen with that reason, and runs."""
    import transformers

    config = transformers.BloomConfig(vocab_size=600, hidden_size=64, n_layer=2, n_head=4)
    folder = tmp_path / "bloom"
    shutil.copytree(model_folder, folder)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    built = build(f"model.base={folder}", "lora=none")
    assert str(built.attention).startswith("eager, because no CUDA device; BloomForCausalLM has no")
    assert "training.use_flash_attn" not in wrong(built)


@pytest.mark.parametrize("lora", ["lora=lora", "lora=none"])
def test_liger_s_functions_are_on_the_model(build, lora):
    """Its kernels need a GPU to run; that they are in place can be seen without."""
    effect = liger(build("training.use_liger=true", lora))
    assert effect.ok and effect.effective is True
    assert "5 LlamaRMSNorm" in effect.how and "2 LlamaMLP" in effect.how


def test_liger_that_patches_nothing(build, monkeypatch):
    monkeypatch.setattr("liger_kernel.transformers._apply_liger_kernel_to_instance", lambda **_: None)
    effect = liger(build("training.use_liger=true"))
    assert not effect.ok and effect.effective == "in 0 of 2 layers"


def test_a_trainer_that_drops_liger(build, monkeypatch):
    import trl

    real = trl.SFTConfig
    kept = lambda **given: real(**{k: v for k, v in given.items() if k != "use_liger_kernel"})  # noqa: E731
    monkeypatch.setattr(trl, "SFTConfig", kept)
    assert not liger(build("training.use_liger=true")).ok


def test_liger_unasked(build):
    from transformers.integrations.liger import apply_liger_kernel

    built = build()
    assert liger(built).ok
    apply_liger_kernel(built.trainer.model, None)
    assert not liger(built).ok


LOSSES = ("task=dpo", "task=grpo", "task=grpo task.beta=0.1 task.loss_type=grpo")


@pytest.mark.slow
@pytest.mark.parametrize("words", LOSSES)
def test_trl_s_liger_losses_are_the_papers(build, monkeypatch, words):
    """They are torch's code, which runs on a CPU too once the model's own kernels are left out."""
    from soup import effects

    monkeypatch.setattr("soup.model.liger.put_on", lambda _: None)
    built = build("training.use_liger=true", *words.split(), "model.dtype=float32")
    wrong = {one.key: one for one in effects.prove(built) if not one.ok}
    assert set(wrong) == {"training.use_liger"}


@pytest.mark.slow
def test_why_kto_is_refused(build, monkeypatch):
    """A rule says so. When this fails, TRL's Liger loss for KTO has become the paper's, and the rule can go."""
    from soup.effects.task import loss

    monkeypatch.setattr("soup.model.liger.put_on", lambda _: None)
    found = {
        one.key: one for one in loss(build("training.use_liger=true", "task=kto", "model.dtype=float32"))
    }
    assert not found["task.name"].ok, found["task.name"].how
