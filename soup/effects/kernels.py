"""The kernels that really run: seen in a forward pass, and on the modules of the model that was built."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from soup.effects import Effect, as_it_was
from soup.effects.model import forward_owner

BESIDE = ("ref_model", "reward_model", "value_model")  # models that a trainer holds beside the policy
FLASH_CALLS = ("flash_attn_func", "flash_attn_varlen_func")
ASKED = {"v2": "flash_attention_2", "v3": "flash_attention_3"}


def attention(built: Any) -> Iterator[Effect]:
    """The attention functions that a forward pass of a few tokens calls, in the policy and in models beside it."""
    key, asked = "training.use_flash_attn", built.config.training.use_flash_attn
    choice = built.attention
    models = {"the model": built.model}
    models |= {name: one for name in BESIDE if (one := getattr(built.trainer, name, None)) is not None}
    ran: dict[str, Counter[str]] = {}
    try:
        for name, model in models.items():
            ran[name] = _attention_calls(built, model)
    except Exception as error:  # noqa: BLE001, attention that cannot run is not in force
        why = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        yield Effect(key, asked, "no forward pass", False, why)
        return
    effective = " and ".join(sorted(ran["the model"])) or str(built.model.config._attn_implementation)
    if choice is None:  # Unsloth's
        flash = "flash" in effective
        wanted = {"off": not flash}.get(asked, True)
        reason = "Unsloth chooses"
    else:
        wanted = effective == choice.implementation and ASKED.get(asked, effective) == effective
        reason = choice.reason
    told = [f"attention: {effective}, because {reason}"]
    for name, calls in ran.items():
        told.append(f"{name} made {', '.join(f'{n} calls of {kind}' for kind, n in calls.items()) or 'none'}")
        if choice is not None and not _fits(calls, choice.implementation, models[name]):
            wanted = False
    if not wanted and choice is not None:
        told[0] = f"attention: {effective}, and {choice} was chosen"
    yield Effect(key, asked, effective, wanted, "; ".join(told))


def _fits(calls: Counter[str], implementation: str, model: Any) -> bool:
    """Whether a model beside the policy runs what was chosen: its class may have no attention but its own."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = {"eager"} if not getattr(type(inner), "_supports_sdpa", False) else set()
    return set(calls) <= {implementation} | own


def _attention_calls(built: Any, model: Any) -> Counter[str]:
    """How often each attention function is called in a forward pass: by their names as Python's profiler sees them."""
    import torch

    calls: Counter[str] = Counter()

    def watch(frame: Any, event: str, argument: Any) -> None:
        if event == "c_call" and getattr(argument, "__name__", "") == "scaled_dot_product_attention":
            calls["sdpa"] += frame.f_globals.get("__name__") != "soup.kernels.attention"  # counted as soup's
        elif event == "call":
            name, module = frame.f_code.co_name, frame.f_globals.get("__name__", "")
            if (module, name) == ("soup.kernels.attention", "attend"):
                calls["soup"] += 1
            elif name == "eager_attention_forward":
                calls["eager"] += 1
            elif name in FLASH_CALLS and module == "flash_attn_interface":
                calls["flash_attention_3"] += 1
            elif name in FLASH_CALLS and module.startswith("flash_attn."):
                calls["flash_attention_2"] += 1
            elif name == "ring_attention_forward":  # of a whole row, as here, it is torch's
                calls.update({"ring": 1, "sdpa": -1})
            elif name == "flex_attention_forward":
                calls["flex_attention"] += 1

    device = next(model.parameters()).device
    ids_1T = torch.arange(8, device=device)[None]
    before = sys.getprofile()
    trainer = built.trainer
    autocast = trainer.accelerator.autocast()  # as accelerate wraps the model when training begins
    with as_it_was(model), torch.no_grad(), trainer.compute_loss_context_manager(), autocast:
        model.eval()
        sys.setprofile(watch)
        try:
            model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False)
        finally:
            sys.setprofile(before)
    return +calls


def liger(built: Any) -> Iterator[Effect]:
    """Modules whose forward function is Liger's: some of each layer, where it is asked for; else none."""
    from soup.model.freeze import stack

    key, asked = "training.use_liger", built.config.training.use_liger
    found = Counter(type(module).__name__ for module in built.model.modules() if _is_liger(module))
    argument = bool(built.trainer.args.use_liger_kernel)
    names = ", ".join(f"{count} {name}" for name, count in sorted(found.items()))
    how = (
        f"modules that run Liger's functions: {names or 'none'}; use_liger_kernel of the trainer: {argument}"
    )
    if not asked:
        yield Effect(key, asked, bool(found) or argument, not found and not argument, how)
        return
    layers = stack(built.model)[1]
    patched = [any(map(_is_liger, layer.modules())) for layer in layers]
    ok = all(patched) and argument
    effective = True if ok else f"in {sum(patched)} of {len(layers)} layers"
    yield Effect(key, asked, effective, ok, how)


def _is_liger(module: Any) -> bool:
    """Whether its forward function was replaced by Liger's, or its class, as Liger does for models built later."""
    return "liger_kernel" in (forward_owner(module), type(module).__module__.partition(".")[0])
