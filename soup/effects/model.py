"""The model that was loaded: its weights, precision, quantization, tokenizer and rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from soup.effects import Effect, same


def weights(built: Any) -> Iterator[Effect]:
    """A few tensors of the model folder against those in memory, to the bit after conversion."""
    import torch

    model_tree = built.config.tree["model"]
    live = {_plain(name): p for name, p in built.model.named_parameters() if "lora_" not in name}
    compared, different = [], []
    for name, stored in _some_tensors(built.model_folder, live):
        in_memory = live[name].detach()
        compared.append(name)
        if not torch.equal(in_memory.cpu(), stored.to(in_memory.dtype)):
            different.append(name)
    ok = bool(compared) and not different
    how = f"{len(compared)} tensors equal those of {built.model_folder.name}" if ok else f"{different} differ"
    yield Effect("model.base", model_tree["base"], model_tree["base"] if ok else "other weights", ok, how)
    if "revision" in model_tree:
        folder = built.model_folder.name
        yield Effect("model.revision", model_tree["revision"], folder, True, "the folder that was loaded")
        remote = type(_base(built.model)).__module__.startswith("transformers_modules")
        asked = model_tree["trust_remote_code"]
        how = f"the model's class is {type(_base(built.model)).__module__}"
        yield Effect("model.trust_remote_code", asked, remote, asked or not remote, how)


def dtype(built: Any) -> Iterator[Effect]:
    """Element types of frozen and trained weights, and of the trainer's autocast."""
    precise = built.precision
    frozen = {p.dtype for p in built.model.parameters() if not p.requires_grad and p.is_floating_point()}
    trained = {p.dtype for p in built.model.parameters() if p.requires_grad}
    args = built.trainer.args
    autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else "none"
    wanted = "none" if precise.autocast is None else _name(precise.autocast)
    main = frozen if built.config.lora.r is not None else trained
    quantized = built.config.model.quantization != "none"
    ok = autocast == wanted and (quantized or main == {precise.weights})
    effective = ", ".join(sorted(map(_name, main)))
    how = f"{precise.reason}; trained weights {sorted(map(_name, trained))}, autocast {autocast}"
    yield Effect("model.dtype", built.config.tree["model"]["dtype"], effective, ok, how)


def quantization(built: Any) -> Iterator[Effect]:
    """Classes of the linear layers, and how their weights are stored."""
    spec = built.config.model
    kinds = [type(module).__name__ for module in built.model.modules()]
    four = [m for m in built.model.modules() if type(m).__name__ == "Linear4bit"]
    eight = kinds.count("Linear8bitLt")
    effective = "4bit" if four else "8bit" if eight else "none"
    how = f"{len(four)} Linear4bit, {eight} Linear8bitLt modules"
    ok = effective == spec.quantization
    if four:
        state = four[0].weight.quant_state
        how += f", {four[0].weight.quant_type}, nested {bool(getattr(state, 'nested', False))}"
        ok = ok and four[0].weight.quant_type == "nf4"
    yield Effect("model.quantization", spec.quantization, effective, ok, how)
    fake = sum("FakeQuantized" in kind for kind in kinds)
    yield same(
        "model.quantization_aware", spec.quantization_aware, fake > 0, f"{fake} fake-quantised modules"
    )


def tokenizer(built: Any) -> Iterator[Effect]:
    """The chat template that the saved tokenizer will carry."""
    asked = built.config.tree["model"]["chat_template"]
    carried = built.tokenizer.chat_template
    if asked is None:
        effective = "none" if carried is None else "the tokenizer's own"
        yield Effect("model.chat_template", None, effective, True, f"{len(carried or '')} characters")
        return
    from soup.data.encode import template_text

    yield Effect(
        "model.chat_template",
        asked,
        f"{len(carried or '')} characters",
        carried == template_text(asked),
        "the tokenizer's template",
    )


def rope(built: Any) -> Iterator[Effect]:
    """`inv_freq` of the rotary embedding, against theta^(-2i/d) (arXiv:2104.09864)."""
    import torch

    tree = built.config.tree["longctx"]
    config = built.model.config.get_text_config()
    own = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    buffers = [
        m.inv_freq for m in built.model.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor)
    ]
    ok, how = True, f"the model's own rotary type, {own}"
    if own == "default" and buffers:
        d = 2 * buffers[0].numel()
        theta = config.rope_parameters["rope_theta"]
        expected = theta ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
        ok = torch.allclose(buffers[0].double().cpu(), expected, rtol=1e-5)
        how = f"inv_freq of {d} dimensions {'equals' if ok else 'differs from'} theta={theta:g}'s formula"
    yield Effect("longctx.rope_scaling_type", tree["rope_scaling_type"], own if not ok else "none", ok, how)
    yield Effect("longctx.rope_factor", tree["rope_factor"], None, tree["rope_factor"] is None, how)
    attention = str(getattr(config, "_attn_implementation", None))
    ring = "ring" in attention
    yield same("longctx.use_ring_attention", tree["use_ring_attention"], ring, f"attention: {attention}")
    yield same("longctx.ring_size", tree["ring_size"], 1 if not ring else None, f"attention: {attention}")


def kernels(built: Any) -> Iterator[Effect]:
    """Whose forward functions the decoder layers run."""
    asked = built.config.backend.kernels
    foreign = sorted(
        {
            type(module).forward.__module__
            for module in built.model.modules()
            if type(module).forward.__module__.startswith("soup.")
        }
    )
    how = "every module runs its library's own forward"
    if asked == "auto":
        how += "; soup has no kernels of its own yet"
    yield Effect("backend.kernels", asked, "stock" if not foreign else str(foreign), not foreign, how)


def _some_tensors(folder: Any, live: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Up to two tensors of each weight file, of those that are in memory unquantized."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            shared = [
                name
                for name in sorted(tensors.keys())
                if name in live and list(live[name].shape) == tensors.get_slice(name).get_shape()
            ]
            for name in shared[:1] + shared[-1:]:
                yield name, tensors.get_tensor(name)


def _plain(name: str) -> str:
    """A parameter's name in the model's own file: without PEFT's wrappers."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
