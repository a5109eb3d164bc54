"""Quantization that is simulated while training: in force wherever it is asked for, and seen where it is not."""

from __future__ import annotations

import pytest

AWARE = ("model.quantization=4bit", "model.quantization_aware=true")
EIGHT = ("model.quantization=8bit", "model.quantization_aware=true")
HONEST = {
    "4 bits": AWARE,
    "8 bits": EIGHT,
    "groups of 16": (*AWARE, "model.quantization_group_size=16"),
    "8 bits in groups of 64": (*EIGHT, "model.quantization_group_size=64"),
    "dora": (*AWARE, "lora=dora", "lora.target_modules=[q_proj,down_proj]"),
    "rslora with dropout": (*AWARE, "lora=rslora", "lora.dropout=0.1"),
    "loraplus": (*EIGHT, "lora=loraplus"),
    "all weights": (*AWARE, "lora=none"),
    "8 bits, all weights": (*EIGHT, "lora=none"),
    "bfloat16": (*AWARE, "model.dtype=bfloat16"),
    "8 bits, bfloat16, all weights": (*EIGHT, "model.dtype=bfloat16", "lora=none"),
    "8 bits, bfloat16": (*EIGHT, "model.dtype=bfloat16"),
    "float32": (*EIGHT, "model.dtype=float32"),
    "checkpointing": (*AWARE, "training.gradient_checkpointing=true", "lora=dora"),
    "checkpointing, all weights": (*AWARE, "training.gradient_checkpointing=true", "lora=none"),
    "frozen layer": (*AWARE, "training.freeze_layers=1"),
    "frozen layer, all weights": (*AWARE, "training.freeze_layers=1", "lora=none"),
    "noise": (*AWARE, "training.neftune_alpha=5.0"),
    "GaLore": (*AWARE, "lora=none", "optim=galore", "optim.galore_rank=8"),
    "an adapted head": (*AWARE, "task=dpo", "lora.target_modules=[q_proj,lm_head]"),
    "packed": (*AWARE, "task=pretrain", "training.packing=true"),
}


@pytest.mark.parametrize("overrides", HONEST.values(), ids=HONEST.keys())
def test_every_setting_is_in_force(build, wrong, overrides):
    assert wrong(build(*overrides)) == {}


def quantize(change):
    """torchao's quantize_ with its arguments changed."""

    def before(monkeypatch):
        import torchao.quantization

        real = torchao.quantization.quantize_
        monkeypatch.setattr(
            torchao.quantization,
            "quantize_",
            lambda model, config, filter_fn: change(real, model, config, filter_fn),
        )

    return before


def skipped(part):
    return quantize(
        lambda real, model, config, wanted: real(
            model, config, filter_fn=lambda m, name: wanted(m, name) and part not in name
        )
    )


def config(**forced):
    def before(monkeypatch):
        import torchao.quantization.qat as qat

        real = qat.IntxFakeQuantizeConfig
        monkeypatch.setattr(
            qat,
            "IntxFakeQuantizeConfig",
            lambda dtype, **given: real(forced.get("dtype", dtype), **given | _without_dtype(forced)),
        )

    return before


def _without_dtype(forced):
    return {key: value for key, value in forced.items() if key != "dtype"}


def eight_bits(monkeypatch):
    import torch

    config(dtype=torch.int8)(monkeypatch)


def blind_filter(monkeypatch):
    from soup.model import qat

    real = qat.linears
    monkeypatch.setattr(
        qat, "linears", lambda model: ((n, m) for n, m in real(model) if not n.endswith("down_proj"))
    )


def unfolded(monkeypatch):
    monkeypatch.setattr("soup.train.build.fold_adapters", lambda _model: None)


def layers(built):
    return [m for m in built.model.modules() if getattr(m, "weight_fake_quantizer", None) is not None]


def switched_off(built):
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    next(m for m in built.model.modules() if isinstance(m, IntxFakeQuantizer)).enabled = False


def deaf_forward(built):
    """The quantizer is right, and the layer does not ask it."""
    import torch

    layer = layers(built)[3]
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight, layer.bias)


def no_gradient(built):
    quantizer = layers(built)[0].weight_fake_quantizer
    real = quantizer.forward
    quantizer.forward = lambda weight: real(weight).detach()


def plain_reference(built):
    for module in built.trainer.ref_model.modules():
        if hasattr(module, "weight_fake_quantizer"):
            module.weight_fake_quantizer = None
            break


def fewer_levels(built):
    import torch

    for layer in layers(built):
        layer.weight_fake_quantizer.quantizer.config.dtype = torch.int3


BEFORE = {
    "a layer skipped": (AWARE, skipped("layers.0."), "model.quantization_aware"),
    "one kind skipped": ((*AWARE, "lora=none"), skipped("v_proj"), "model.quantization"),
    "all skipped": (AWARE, quantize(lambda *_: None), "model.quantization_aware"),
    "other groups": (AWARE, config(group_size=64), "model.quantization_group_size"),
    "no groups": (
        (*AWARE, "lora=none"),
        config(group_size=None, granularity="per_channel"),
        "model.quantization",
    ),
    "more bits": (AWARE, eight_bits, "model.quantization"),
    "a filter that misses": (EIGHT, blind_filter, "model.quantization_aware"),
    "adapters left out": (AWARE, unfolded, "model.quantization"),
    "adapters left out, 8 bits": (EIGHT, unfolded, "model.quantization"),
}
AFTER = {
    "switched off": (AWARE, switched_off, "model.quantization"),
    "deaf": (AWARE, deaf_forward, "model.quantization"),
    "deaf, all weights in 8 bits": ((*EIGHT, "lora=none"), deaf_forward, "model.quantization"),
    "no gradient": ((*AWARE, "lora=none"), no_gradient, "model.quantization_aware"),
    "fewer levels": (AWARE, fewer_levels, "model.quantization"),
    "a plain copy for DPO": ((*AWARE, "lora=none", "task=dpo"), plain_reference, "model.quantization_aware"),
    "a plain copy for GRPO": (
        (*AWARE, "lora=none", "task=grpo", "task.beta=0.1"),
        plain_reference,
        "model.quantization_aware",
    ),
}


@pytest.mark.parametrize(("words", "before", "key"), BEFORE.values(), ids=BEFORE.keys())
def test_a_library_drops_it(build, wrong, monkeypatch, words, before, key):
    before(monkeypatch)
    assert key in wrong(build(*words))


@pytest.mark.parametrize(("words", "after", "key"), AFTER.values(), ids=AFTER.keys())
def test_the_build_is_spoilt(build, wrong, words, after, key):
    built = build(*words)
    after(built)
    assert key in wrong(built)


def test_unasked_for_it_is_seen(build, wrong):
    import torch
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    built = build()
    quantize_(
        built.model,
        QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32), step="prepare"),
        filter_fn=lambda _, name: name.endswith("up_proj.base_layer"),
    )
    assert {"model.quantization_aware", "model.quantization_group_size"} <= set(wrong(built))


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantized_layer_that_computes_something_else(build, wrong, quantization):
    kind = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[quantization]
    built = build(f"model.quantization={quantization}")
    module = next(m for n, m in built.model.named_modules() if n.endswith("base_layer"))
    assert type(module).__name__ == kind
    real = module.forward
    module.forward = lambda x: 1.3 * real(x)
    assert "model.quantization" in wrong(built)


def test_a_policy_starts_as_its_reference(build):
    """Adapters off, or a frozen copy: both are the model in the integers that it starts with."""
    import torch

    ids = torch.arange(3, 20)[None]
    for words in (("lora=lora",), ("lora=none",)):
        built = build(*AWARE, "task=dpo", "model.dtype=float32", *words)
        model, copy = built.model.eval(), built.trainer.ref_model
        with torch.no_grad():
            policy = model(ids).logits
            if copy is None:
                with model.disable_adapter():
                    reference = model(ids).logits
            else:
                reference = copy.eval()(ids).logits
        assert torch.equal(policy, reference)
