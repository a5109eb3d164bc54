"""Loading for training: what each precision, quantization and adapter comes to, and models that cannot be loaded."""

from __future__ import annotations

import json
import shutil

import pytest

from soup import schema, specs
from soup.device import Device
from soup.errors import Refused
from soup.model import source

PLAIN = Device(kind="cpu", bf16=False, reason="this CPU has no bfloat16 instructions")
FAST = Device(kind="cpu", bf16=True, reason="this CPU has avx512_bf16")


@pytest.mark.parametrize(
    ("overrides", "device", "weights", "products"),
    [
        ((), PLAIN, "float32", None),
        ((), FAST, "bfloat16", "bfloat16"),
        (("lora=none",), FAST, "float32", "bfloat16"),
        (("lora=none",), PLAIN, "float32", None),
        (("model.dtype=float32",), FAST, "float32", None),
        (("model.dtype=bfloat16",), PLAIN, "bfloat16", "bfloat16"),
    ],
)
def test_precision(tree, overrides, device, weights, products):
    import torch

    from soup.model.load import precision

    config = schema.check(tree(*overrides))
    found = precision(config.model, config.lora, device)
    assert found.weights is getattr(torch, weights)
    assert found.autocast is (products and getattr(torch, products))
    assert found.reason


def test_auto_says_why_it_is_not_bfloat16(tree):
    from soup.model.load import precision

    config = schema.check(tree())
    assert PLAIN.reason in precision(config.model, config.lora, PLAIN).reason


@pytest.mark.parametrize("modules", ["q_proj", "[q_proj,v_proj]", "all-linear"])
def test_a_name_of_modules_is_no_regular_expression(tree, modules):
    from soup.model.load import adapter

    names = adapter(schema.check(tree(f"lora.target_modules={modules}")).lora).target_modules
    assert names == (modules if modules == "all-linear" else set(modules.strip("[]").split(",")))


def test_no_adapter_where_all_weights_train(tree):
    from soup.model.load import adapter

    assert adapter(schema.check(tree("lora=none")).lora) is None


@pytest.fixture
def spoilt(tiny_model, tmp_path, tree):
    """The specification of a copy of the tiny model, spoilt by a function of its folder."""

    def made(spoil):
        folder = tmp_path / "model"
        shutil.copytree(tiny_model, folder)
        spoil(folder)
        return schema.check(tree(f"model.base={folder}")).model

    return made


def load(spec, **options):
    from soup.model.load import load_model, precision

    return load_model(source.folder(spec), spec, precision(spec, specs.LoraSpec(), PLAIN), PLAIN, **options)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_folder_is_refused_before_anything_loads(spoilt, name):
    spec = spoilt(lambda folder: (folder / name).unlink())
    with pytest.raises(Refused) as refused:
        source.folder(spec)
    (problem,) = refused.value.problems
    assert problem.key == "model.base"
    assert name.removeprefix("model.") in problem.why


@pytest.mark.parametrize(("head", "kind"), [("causal", "causal language model"), ("score", "reward model")])
def test_a_model_that_generates_no_text_is_refused(spoilt, head, kind):
    spec = spoilt(lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "vit"})))
    with pytest.raises(Refused, match=f"cannot be loaded as a {kind}: ") as refused:
        load(spec, head=head)
    assert len(str(refused.value).splitlines()) == 2


def test_damaged_weights_are_refused(spoilt):
    spec = spoilt(lambda folder: (folder / "model.safetensors").write_bytes(b"nothing of the kind"))
    with pytest.raises(Refused, match="cannot be loaded"):
        load(spec)


def test_missing_weights_are_refused(spoilt):
    """transformers would train random ones in their place."""
    from safetensors.torch import load_file, save_file

    def without(folder):
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(Refused, match=r"no weights for 1 of the tensors, model\.layers\.1\.mlp\.up_proj"):
        load(spoilt(without))


def test_a_config_that_is_no_object_is_refused(spoilt):
    spec = spoilt(lambda folder: (folder / "config.json").write_text("[]"))
    with pytest.raises(Refused, match="no object"):
        source.config(source.folder(spec))


def test_a_tokenizer_without_a_padding_token_gets_one(spoilt):
    from soup.model.load import load_tokenizer

    def without(folder):
        file = folder / "tokenizer_config.json"
        file.write_text(
            json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "pad_token"})
        )

    spec = spoilt(without)
    tokenizer = load_tokenizer(source.folder(spec), spec)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


def test_a_hub_name_that_is_not_there_is_refused_offline(tree):
    config = schema.check(tree("model.base=nobody/nothing-of-this-name"))
    with pytest.raises(Refused) as refused:
        source.folder(config.model)
    assert refused.value.problems[0].key == "model.base"
    assert "online" in refused.value.problems[0].fix


def test_a_local_folder_has_no_revisions(tree):
    config = schema.check(tree("model.revision=main"))
    with pytest.raises(Refused, match="model.revision=main"):
        source.folder(config.model)
