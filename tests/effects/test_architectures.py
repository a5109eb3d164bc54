"""Probes judge other families of models as they judge Llama: an honest build of each is in force, key by key."""

from __future__ import annotations

import shutil

import pytest

SMALL = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 600, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
FAMILIES = {
    "qwen2": ("Qwen2", SMALL),
    "qwen3": ("Qwen3", SMALL),
    "mistral": ("Mistral", SMALL),
    "gemma2": ("Gemma2", SMALL),
    "gemma3": ("Gemma3Text", SMALL | {"num_hidden_layers": 6}),
    "phi3": ("Phi3", {key: value for key, value in SMALL.items() if key != "head_dim"}),
    "olmo2": ("Olmo2", {key: value for key, value in SMALL.items() if key != "head_dim"}),
    "gpt2": ("GPT2", GPT2 | {"bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": (
        "GPTNeoX",
        {key: value for key, value in SMALL.items() if key not in ("head_dim", "num_key_value_heads")},
    ),
    "llama, scaled": (
        "Llama",
        SMALL
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
    ),
}
ADAPTED = ("lora=lora", "lora=none", "lora=dora", "model.quantization=4bit")
AWARE = ("model.quantization=4bit", "model.quantization_aware=true")


@pytest.fixture(scope="module")
def family(model_folder, tmp_path_factory):
    """A folder with a random model of a family."""
    made = {}

    def folder(name):
        if name not in made:
            import torch
            import transformers

            kind, settings = FAMILIES[name]
            with torch.random.fork_rng():
                torch.manual_seed(0)
                config = getattr(transformers, f"{kind}Config")(**settings)
                model = transformers.AutoModelForCausalLM.from_config(config)
            made[name] = tmp_path_factory.mktemp("family") / "model"
            shutil.copytree(model_folder, made[name])
            model.save_pretrained(made[name])
        return made[name]

    return folder


@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_setting_is_in_force(family, build, wrong, name, adapted):
    assert wrong(build(adapted, f"model.base={family(name)}")) == {}


@pytest.mark.parametrize("lora", ["none", "dora"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3", "phi3", "gpt_neox"])
def test_muon_has_the_matrices_of_every_family(family, build, wrong, name, lora):
    built = build("optim=muon", f"lora={lora}", f"model.base={family(name)}")
    assert wrong(built) == {}
    groups = built.trainer.optimizer.param_groups
    sizes = {p.ndim for group in groups if "momentum" in group for p in group["params"]}
    assert sizes == {2}


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "qwen2", "phi3", "olmo2"])
def test_the_base_models_loss_orders_rows_of_every_family(family, build, wrong, name):
    words = ("training.curriculum=true", "training.curriculum_metric=loss")
    assert wrong(build(*words, f"model.base={family(name)}")) == {}


@pytest.mark.parametrize("choice", ["lora=lora", "lora=none"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gpt2"])
def test_simulated_quantization_is_in_force(family, build, wrong, name, choice):
    assert wrong(build(f"model.base={family(name)}", *AWARE, choice)) == {}


def test_simulated_quantization_of_no_linear_layer_is_refused(family, build):
    from soup.errors import Refused

    with pytest.raises(Refused, match="no linear layer"):
        build(f"model.base={family('gpt2')}", *AWARE)
