"""The model folder that a run leaves, read by the libraries that other people use."""

from __future__ import annotations

import json

import pytest

TRAINED = ("model.dtype=float32", "training.max_steps=3", "optim.lr=1e-2", "training.logging_steps=1")


@pytest.fixture
def finished(build, place, tree, tmp_path):
    """`finished("lora=dora")`: a trained build, and its run with the model folder saved."""

    def trained(*overrides):
        from soup.train.finish import save_model

        built = build(*TRAINED, *overrides)
        run = place(tree(*TRAINED, *overrides))
        built.trainer.metrics_file = tmp_path / "metrics.jsonl"
        built.trainer.train()
        save_model(run, built, {"step": 3, "loss": 1.5})
        return built, run

    return trained


def logits(model):
    import torch

    model.eval()
    with torch.no_grad():
        return model.float()(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize(
    "overrides",
    [(), ("lora=dora",), ("lora=rslora", "lora.target_modules=[q_proj,down_proj]"), ("lora.alpha=5",)],
    ids=" ".join,
)
def test_an_adapter_loads_with_peft_and_merges(finished, tiny_model, tmp_path, overrides):
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from soup.model.merge import merge

    built, run = finished(*overrides)
    trained = logits(built.model)
    untrained = logits(AutoModelForCausalLM.from_pretrained(tiny_model))
    assert (trained - untrained).abs().max() > 1e-2
    # soup's kernel scales the adapter's product where PEFT scales its result
    assert torch.allclose(logits(AutoPeftModelForCausalLM.from_pretrained(run.model)), trained, atol=1e-6)

    merge(run.model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), trained, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == built.tokenizer.chat_template
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_all_weights_load_with_transformers(finished):
    import torch
    from transformers import AutoModelForCausalLM

    built, run = finished("lora=none")
    trained = logits(built.model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(run.model)), trained)


def test_adapters_of_a_quantized_model_merge_into_its_base(finished, tmp_path):
    """The export is the plain base with the adapter folded in; 4 bits were for training."""
    from transformers import AutoModelForCausalLM

    from soup.model.merge import merge

    _, run = finished("model.quantization=4bit")
    merge(run.model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")


def test_the_tokenizer_carries_the_template_that_was_trained(finished):
    from transformers import AutoTokenizer

    template = "{% for m in messages %}{{ m.role + '>' + m.content + '<' }}{% endfor %}"
    _, run = finished(f'model.chat_template="{template}"')
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "user>a<"


@pytest.mark.parametrize(("choice", "library"), [("lora=lora", "peft"), ("lora=none", "transformers")])
def test_the_card_says_how_it_came_to_be(finished, tiny_model, choice, library):
    from huggingface_hub import ModelCard
    from omegaconf import OmegaConf

    _, run = finished(choice, "run.name=keeper")
    card = ModelCard.load(run.model / "README.md")
    assert card.data.base_model == str(tiny_model)
    assert card.data.library_name == library
    assert {"soup", "sft"} <= set(card.data.tags)
    assert "# keeper" in card.text
    assert "- loss: 1.5" in card.text
    written = card.text.partition("```yaml\n")[2].partition("```")[0]
    assert OmegaConf.create(written) == OmegaConf.load(run.config)
    assert not (run.model / "training_args.bin").exists()
    names = {path.name for path in run.model.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "README.md"} <= names
    if library == "peft":
        assert json.loads((run.model / "adapter_config.json").read_text())["base_model_name_or_path"]
