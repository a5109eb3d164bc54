"""Rotary embeddings: frequencies and sines of the live modules, against the papers' formulas, written here once more.

A formula takes the plain frequencies theta^(-i/n) of n pairs (arXiv:2104.09864), in radians a token, and returns those
that must be in force for a batch of `tokens`, and what cosine and sine are multiplied by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

from soup.effects import Effect
from soup.model import source
from soup.rope import LAYERED, Scaling, current, scaling

FREQUENCIES = "inv_freq"
NEAR = 8  # positions whose sines are compared: further ones lose digits in float32


def linear(plain: Sequence[float], to: Scaling, _theta: float, _tokens: int) -> tuple[list[float], float]:
    """Position interpolation (arXiv:2306.15595, eq. 4)."""
    return [f / to.factor for f in plain], 1.0


def dynamic(plain: Sequence[float], to: Scaling, theta: float, tokens: int) -> tuple[list[float], float]:
    """NTK-aware scaling that follows the length (arXiv:2309.00071, eq. 15 and 16, and appendix B), with the factor as
    its inventor has it: it grows from 1 at the model's own length on."""
    pairs = len(plain)
    grown = to.factor * max(tokens, to.own) / to.own - (to.factor - 1)
    base = theta * grown ** (pairs / (pairs - 1))
    return [base ** (-i / pairs) for i in range(pairs)], 1.0


def yarn(plain: Sequence[float], to: Scaling, theta: float, _tokens: int) -> tuple[list[float], float]:
    """NTK by parts (arXiv:2309.00071, section 3.2) with the ramp over the frequencies' numbers, to whole ones, as in
    the authors' code; attention by its eq. 22."""

    def number(turns: float) -> float:
        """Of the frequency that turns so often in the model's own length."""
        return len(plain) * math.log(to.own / (2 * math.pi * turns)) / math.log(theta)

    first = max(math.floor(number(to.parameters["beta_fast"])), 0)
    last = min(math.ceil(number(to.parameters["beta_slow"])), 2 * len(plain) - 1)
    width = last - first or 0.001
    shares = [min(max((i - first) / width, 0.0), 1.0) for i in range(len(plain))]
    blended = [f * (1 - share) + f / to.factor * share for f, share in zip(plain, shares, strict=True)]
    return blended, 0.1 * math.log(to.factor) + 1


def longrope(plain: Sequence[float], to: Scaling, _theta: float, tokens: int) -> tuple[list[float], float]:
    """Non-uniform interpolation (arXiv:2402.13753, eq. 3), and its attention factor (section 3.3 of Phi-3's code)."""
    factors = to.parameters["long_factor" if tokens > to.own else "short_factor"]
    attention = math.sqrt(1 + math.log(to.factor) / math.log(to.own))
    return [f / factor for f, factor in zip(plain, factors, strict=True)], attention


def llama3(plain: Sequence[float], to: Scaling, _theta: float, _tokens: int) -> tuple[list[float], float]:
    """Llama 3.1's `apply_scaling` (llama-models), in turns instead of wavelengths."""
    low, high = to.parameters["low_freq_factor"], to.parameters["high_freq_factor"]
    turns = [to.own * f / (2 * math.pi) for f in plain]
    kept = [min(max((turn - low) / (high - low), 0.0), 1.0) for turn in turns]
    return [f * keep + f / to.factor * (1 - keep) for f, keep in zip(plain, kept, strict=True)], 1.0


FORMULAS = {"linear": linear, "dynamic": dynamic, "yarn": yarn, "longrope": longrope, "llama3": llama3}


def rope(built: Any) -> Iterator[Effect]:
    """The rotary embedding of the model and of a frozen copy beside it."""
    to = scaling(built.config, source.config(built.model_folder))
    yield from _unscaled(built) if to is None else _scaled(built, to)


def _scaled(built: Any, to: Scaling) -> Iterator[Effect]:
    tree = built.config.tree["longctx"]
    own = _own(built)
    lengths = (to.own, to.length, (to.own + to.length) // 2, to.own)  # the third shorter than one before it
    compared, wrong = 0, []
    models = {"": built.model, "reference.": getattr(built.trainer, "ref_model", None)}
    for where, model in models.items():
        for name, module, prefix in [] if model is None else rotary(model):
            compared += 1
            parameters = own.rope_parameters
            if prefix:
                parameters = parameters[prefix.removesuffix("_")]
            layers = prefix in ("", f"{LAYERED}_")
            off = _off(module, prefix, parameters["rope_theta"], to if layers else None, lengths)
            if off is not None:
                wrong.append(f"{where}{name}.{prefix}{FREQUENCIES} {off}")
    config = built.model.config.get_text_config()
    live = current({"rope_parameters": getattr(config, "rope_parameters", None) or {}})
    positions = config.max_position_embeddings
    ok = compared > 0 and not wrong and positions == to.positions
    attention = FORMULAS[to.kind]([1.0, 0.1], _of_two(to), 10.0, to.length)[1]
    how = f"{compared} rotary modules have the formula's frequencies and attention factor {attention:.4g} for batches"
    how += f" of {', '.join(map(str, lengths))} tokens; {to.reason}; max_position_embeddings {positions}"
    if not ok:
        how = f"not the formula's: {', '.join(wrong[:3]) or 'there is no rotary module'}; the configuration says"
        how += f" {live.get('rope_type')} by {live.get('factor')}, max_position_embeddings {positions}"
    name = "longctx.rope_scaling_type"
    kind = live.get("rope_type", "default")
    yield Effect(
        name, to.kind, kind if ok else f"other frequencies than {to.kind}", ok and kind == to.kind, how
    )
    yield Effect(
        "longctx.rope_factor",
        tree["rope_factor"],
        live.get("factor"),
        ok and live.get("factor") == to.factor,
        how,
    )
    for parameter in set(to.parameters) & set(tree):
        key, found = f"longctx.{parameter}", live.get(parameter)
        yield Effect(key, tree[parameter], found, ok and found == tree[parameter], how)


def _of_two(to: Scaling) -> Scaling:
    """The same scaling of two frequencies: the attention factor asks for no more."""
    lists = {name: value[:2] for name, value in to.parameters.items() if isinstance(value, list)}
    return Scaling(**(vars(to) | {"parameters": {**to.parameters, **lists}}))


def _unscaled(built: Any) -> Iterator[Effect]:
    """Frequencies in memory, against those that a module made anew from config.json on disk has."""
    import torch

    tree, own = built.config.tree["longctx"], _own(built)
    kind = current({"rope_parameters": getattr(own, "rope_parameters", None) or {}}).get(
        "rope_type", "default"
    )
    compared, different = 0, []
    for name, module, prefix in rotary(built.model):
        key = f"{prefix}{FREQUENCIES}"
        wanted, found = getattr(type(module)(own), key).float(), getattr(module, key).float().cpu()
        compared += 1
        right = wanted.shape == found.shape and torch.allclose(wanted, found, rtol=1e-5)
        if not right:
            different.append(f"{name}.{key}")
        elif not _turns_alike(module, type(module)(own), prefix):
            different.append(f"{name}'s sines, of the right frequencies,")
    ok = not different
    how = f"{compared} buffers inv_freq are those of config.json, rotary type {kind}"
    if not ok:
        how = f"{', '.join(different)} differs from what config.json gives, rotary type {kind}"
    name = "longctx.rope_scaling_type"
    yield Effect(name, tree["rope_scaling_type"], "none" if ok else "other frequencies", ok, how)
    yield Effect("longctx.rope_factor", tree["rope_factor"], None if ok else "unknown", ok, how)


def _turns_alike(module: Any, anew: Any, prefix: str) -> bool:
    """Whether sines and cosines of a few positions are those of its frequencies, times the attention factor of a module
    made anew; where a rotary module gives something else, whether that is what the new one gives."""
    import torch

    frequencies_F = getattr(module, f"{prefix}{FREQUENCIES}").double().cpu()
    device = getattr(module, f"{prefix}{FREQUENCIES}").device
    layer = {"layer_type": prefix.removesuffix("_")} if prefix else {}
    with torch.no_grad():
        live, other = (
            one(torch.zeros(1, device=device), torch.arange(NEAR, device=device)[None], **layer)
            for one in (deepcopy(module), anew.to(device))
        )
    if not isinstance(live, tuple):
        return bool(torch.allclose(live, other, atol=1e-4))
    angle_TF = torch.arange(NEAR, dtype=torch.float64)[:, None] * frequencies_F
    factor = getattr(anew, f"{prefix}attention_scaling", 1.0)
    for part, anew_part, right_TF in zip(live, other, (angle_TF.cos(), angle_TF.sin()), strict=True):
        halves = torch.cat((right_TF, right_TF), 1), right_TF.repeat_interleave(2, 1), right_TF
        fitting = [factor * one for one in halves if one.shape == part[0].shape] or [
            anew_part[0].double().cpu()
        ]
        if not any(_close(part[0].double().cpu(), one, atol=1e-4) for one in fitting):
            return False
    return True


def rotary(model: Any) -> list[tuple[str, Any, str]]:
    """Rotary modules by name, each once per kind of layer that it has frequencies for, named by the prefix."""
    return [
        (name, module, key.removesuffix(FREQUENCIES))
        for name, module in model.named_modules()
        for key, _ in module.named_buffers(recurse=False, remove_duplicate=False)
        if key.endswith(FREQUENCIES) and not key.endswith(f"original_{FREQUENCIES}")
    ]


def _off(module: Any, prefix: str, theta: float, to: Scaling | None, lengths: Sequence[int]) -> str | None:
    """Where first a rotary module does something else than the formula; `to=None`: than no scaling.

    A copy of the live module is called, as a batch of that length calls it: dynamic scaling changes it.
    """
    import torch

    twin = deepcopy(module)
    used: list[Any] = []
    key = f"{prefix}{FREQUENCIES}"
    twin.register_forward_hook(lambda rotary, *_: used.append(getattr(rotary, key)), prepend=True)
    device = getattr(module, key).device
    pairs = len(getattr(module, key))
    plain = [theta ** (-i / pairs) for i in range(pairs)]
    layer = {"layer_type": prefix.removesuffix("_")} if prefix else {}
    for tokens in (None, *lengths):  # first as it stands
        wanted, attention = (plain, 1.0) if to is None else FORMULAS[to.kind](plain, to, theta, tokens or 1)
        wanted_F = torch.tensor(wanted, dtype=torch.float64)
        positions_T = torch.tensor([*range(NEAR), (tokens or NEAR + 1) - 1], device=device)
        if tokens is not None:
            with torch.no_grad():
                cos_TD, sin_TD = (
                    part[0, :NEAR].double().cpu()
                    for part in twin(torch.zeros(1, device=device), positions_T[None], **layer)
                )
            angle_TF = torch.arange(NEAR, dtype=torch.float64)[:, None] * wanted_F
            for live_TD, right_TF in ((cos_TD, angle_TF.cos()), (sin_TD, angle_TF.sin())):
                halves = torch.cat((right_TF, right_TF), 1), right_TF.repeat_interleave(2, 1)
                if not any(_close(live_TD, attention * right_TD, atol=1e-4) for right_TD in halves):
                    return f"at {tokens} tokens"
        if not _close((used or [getattr(twin, key)])[-1].double().cpu(), wanted_F, rtol=1e-5):
            return f"at {tokens} tokens" if tokens is not None else "as it stands"
    return None


def _close(found: Any, wanted: Any, **tolerance: float) -> bool:
    import torch

    return found.shape == wanted.shape and torch.allclose(
        found, wanted, **({"rtol": 0.0, "atol": 0.0} | tolerance)
    )


def _own(built: Any) -> Any:
    """The text model's configuration as its folder has it."""
    from transformers import AutoConfig

    trust = built.config.model.trust_remote_code
    return AutoConfig.from_pretrained(built.model_folder, trust_remote_code=trust).get_text_config()
