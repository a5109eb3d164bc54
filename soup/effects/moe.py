"""Mixtures of experts: adapters on the experts, the router, and the balancing loss that training adds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from soup.effects import Effect, as_it_was
from soup.model.experts import count, fused, routers

# The matrices that a checkpoint has for each expert, and where transformers 5 fuses them: parameter, and which half.
PARTS = {
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "down_proj": ("down_proj", 0, 1),
}
NEAR = 2e-2  # of what an adapter adds, in 16 bits
PARTS |= {"w1": PARTS["gate_proj"], "w3": PARTS["up_proj"], "w2": PARTS["down_proj"]}


def experts(built: Any) -> Iterator[Effect]:
    """Adapters on experts by their shapes and by the gradients that reach them, and the router, which has none."""
    model, spec = built.model, built.config.lora
    key, asked = "training.moe_lora", built.config.training.moe_lora
    number = count(model)
    wrapped = {name: m for name, m in model.named_modules() if _is_wrapper(m)}
    named = [n for n, _ in model.named_parameters() if "lora_" in n and ".experts." in f".{n}"]
    if not asked:
        on = bool(wrapped) or bool(named)
        how = "no adapter parameter on an expert" if number else "this model has no experts"
        if number and spec.r is None:
            how = "experts and router train as all weights do"
        yield Effect(key, asked, on, not on, how if not on else f"adapters on {(named or list(wrapped))[0]}")
    else:
        above = _above(built, fused(model))
        shaped = [m for m in wrapped.values() if _shapes(m) == _expected(m, spec.r)]
        on = {id(_parameter(m)) for m in shaped}
        ok = bool(above) and on == {id(p) for p in above.values()} and len(shaped) == len(wrapped)
        reached, why = _reached(built, wrapped)
        off = _off(built, wrapped)
        how = f"{len(on)} of {len(above)} parameters of {number} experts have A and B of rank {spec.r} for each expert"
        how += f"; a backward pass reaches {reached} of {len(wrapped)}{why}"
        how += f"; what they add to experts is {off:.1e} of its size off"
        ok = ok and reached == len(wrapped) and off <= NEAR
        yield Effect(key, asked, ok if ok else f"on {len(on)} of {len(above)}", ok, how)
    if number and spec.r is not None:
        routing = routers(model)
        spoilt = [
            name
            for name, module in routing.items()
            if hasattr(module, "base_layer") or any(p.requires_grad for p in module.parameters())
        ]
        if spoilt or not routing:
            how = f"{len(spoilt)} of {len(routing)} routers train or have adapters: {spoilt[:2]}"
            yield Effect(key, asked, "the router as well", False, how)


def balancing(built: Any) -> Iterator[Effect]:
    """What the balancing loss adds to the trainer's loss, against its formula on what the routers say of the same rows.

    The loss is computed with the balancing loss and without; the difference must be the coefficient times the loss of
    arXiv:2101.03961, equations 4 to 6, with Mixtral's k experts a token, over all layers.
    """
    key, asked = "training.moe_aux_loss_coeff", built.config.training.moe_aux_loss_coeff
    own = _own(built)
    if not count(built.model):
        yield Effect(key, asked, None, asked is None, "this model has no router")
        return
    if own is None or not built.config.task.balances:
        added = getattr(built.trainer, "aux_loss_enabled", False)
        why = (
            "this task's loss"
            if not built.config.task.balances
            else "the loss of this family in TRL's trainers"
        )
        how = f"{why} has no balancing term"
        yield Effect(key, asked, "on" if added else None, asked is None and not added, how)
        return
    wanted = own if asked is None else asked
    told = _coefficients(built)
    try:
        added, term, room = _added(built)
    except Exception as error:  # noqa: BLE001, a loss that cannot be computed is refused as well
        yield Effect(key, asked, "no loss", False, f"{type(error).__name__}: {error}".splitlines()[0])
        return
    ok = abs(added - wanted * term) <= room + 2e-2 * abs(wanted * term) and set(told) == {wanted}
    live = told[0] if len(set(told)) == 1 and ok else added / term if term else None
    how = f"the balancing loss adds {added:.6g} to the trainer's loss, and its formula gives {term:.6g}"
    how += f"; the model's own coefficient is {own}"
    yield Effect(key, asked, live, ok, how)


@contextmanager
def unbalanced(trainer: Any) -> Iterator[None]:
    """The trainer's loss without the balancing loss."""
    text = trainer.model.config.get_text_config()
    switches = ((trainer, "aux_loss_enabled"), (text, "output_router_logits"))
    kept = [(thing, name, getattr(thing, name)) for thing, name in switches if hasattr(thing, name)]
    try:
        for thing, name, _ in kept:
            setattr(thing, name, False)
        yield
    finally:
        for thing, name, value in kept:
            setattr(thing, name, value)


@contextmanager
def every_expert(built: Any) -> Iterator[None]:
    """Each token passes all experts, of policy and reference. Which few it passes otherwise hangs on rounding, which
    padding changes, so that the losses of one row alone and in a batch would differ by more than rounding.
    """
    models = [one for one in (built.model, getattr(built.trainer, "ref_model", None)) if one is not None]
    number = count(built.model)
    found = [router for one in models for router in routers(one).values() if hasattr(router, "top_k")]
    kept = [(router, router.top_k) for router in found]
    try:
        for router in found:
            router.top_k = number
        yield
    finally:
        for router, few in kept:
            router.top_k = few


def balancing_loss(logits: list[Tensor], seen_N: Tensor | None, top: int) -> float:
    """E times the sum over experts of f, the share of tokens that an expert gets (k in all), and P, its mean
    probability; `logits` of each layer, shape (N, E); `seen_N`: which tokens are no padding.
    """
    rows, chosen, probability = 0.0, 0.0, 0.0
    for layer_NE in logits:
        p_NE = layer_NE.double().softmax(-1)
        seen = torch.ones(len(p_NE), dtype=torch.double) if seen_N is None else seen_N.double()
        picked_NE = torch.zeros_like(p_NE).scatter(1, p_NE.topk(top, -1).indices, 1.0)
        chosen = chosen + (seen[:, None] * picked_NE).sum(0)
        probability = probability + (seen[:, None] * p_NE).sum(0)
        rows = rows + seen.sum()
    return float(len(chosen) * (chosen / rows * probability / rows).sum())


def stored_expert(name: str, live: Mapping[str, Tensor]) -> Tensor | None:
    """The part of a fused parameter in memory that a checkpoint's tensor of one expert was read into."""
    match = re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.weight", fused_name(name))
    if match is None or match[3] not in PARTS:
        return None
    leaf, half, halves = PARTS[match[3]]
    whole = live.get(f"{match[1]}.experts.{leaf}")
    return None if whole is None else whole[int(match[2])].chunk(halves)[half]


def fused_name(name: str) -> str:
    """A tensor's name on disk as transformers 5 has it in memory; Mixtral's blocks had another."""
    return name.replace(".block_sparse_moe.", ".mlp.")


def _is_wrapper(module: Any) -> bool:
    return hasattr(module, "parameter_name") and hasattr(module, "lora_A")


def _parameter(wrapper: Any) -> Tensor:
    base = wrapper.base_layer
    while hasattr(base, "base_layer"):
        base = base.base_layer
    return getattr(base, wrapper.parameter_name)


def _shapes(wrapper: Any) -> list[tuple[int, ...]]:
    return [tuple(side.weight.shape) for sides in (wrapper.lora_A, wrapper.lora_B) for side in sides.values()]


def _expected(wrapper: Any, rank: int) -> list[tuple[int, ...]]:
    """Shapes of A and B of all experts side by side; a fused weight is (experts, outputs, inputs), or transposed."""
    experts, outputs, inputs = _parameter(wrapper).shape
    base = wrapper.get_base_layer()
    if getattr(base, "is_transposed", False):
        outputs, inputs = inputs, outputs
    return [(rank * experts, inputs), (outputs, rank * experts)]


def _above(built: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that lie in layers that are not to be frozen."""
    from soup.effects.adapters import _frozen_modules

    frozen = _frozen_modules(built)
    return {name: p for name, p in parameters.items() if name.rpartition(".")[0] not in frozen}


def _reached(built: Any, wrapped: Mapping[str, Any]) -> tuple[int, str]:
    """How many wrappers' B have a gradient that is not zero for each expert, after a backward pass of a few tokens that
    pass them all."""
    model = built.model
    ids_1T = torch.arange(1, 65, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
    with as_it_was(model), every_expert(built), built.trainer.accelerator.autocast():
        model.eval()
        try:
            with torch.enable_grad():
                model(input_ids=ids_1T, use_cache=False).logits.float().square().sum().backward()
            found = [
                (m.num_experts, [one.weight.grad for one in m.lora_B.values()]) for m in wrapped.values()
            ]
            # Where some router passes tokens to few experts all the same, one expert stands for all.
            every = all if all(hasattr(one, "top_k") for one in routers(model).values()) else any
            # PEFT has the experts of each of B's ranks side by side.
            return sum(
                all(g is not None and every(g.unflatten(1, (-1, experts)).any(1).any(0)) for g in grads)
                for experts, grads in found
            ), ""
        except Exception as error:  # noqa: BLE001
            return 0, f" ({type(error).__name__}: {error})".splitlines()[0]
        finally:
            for parameter in model.parameters():
                parameter.grad = None


def _off(built: Any, wrapped: Mapping[str, Any]) -> float:
    """Distance of what the first adapter of each name adds to its first and its last expert, while the model runs, from
    the scaled product of B and A, over that product's norm."""
    from soup.effects.undisturbed import undisturbed

    chosen = {m.parameter_name: m for m in reversed(wrapped.values())}
    kept, found = {name: m.lora_B["default"].weight.detach().clone() for name, m in chosen.items()}, {}

    def look(name: str, experts: Any, _: Any) -> None:
        found[name] = getattr(experts, name)[[0, -1]].detach().clone()

    worst = 0.0
    handles = []
    try:
        with undisturbed(built), every_expert(built):
            plain = {name: _parameter(m)[[0, -1]].detach().clone() for name, m in chosen.items()}
            for name, module in chosen.items():
                up_OR = module.lora_B["default"].weight
                up_OR.copy_(torch.sin(torch.arange(up_OR.numel(), device=up_OR.device)).view_as(up_OR))
                handles.append(module.get_base_layer().register_forward_pre_hook(partial(look, name)))
            built.model(input_ids=torch.arange(1, 9, device=built.model.device)[None], use_cache=False)
            for name, module in chosen.items():
                experts = module.num_experts
                down_ERI = module.lora_A["default"].weight.unflatten(0, (experts, -1))
                up_ERO = module.lora_B["default"].weight.unflatten(1, (-1, experts)).permute(2, 1, 0)
                for place, expert in enumerate((0, -1)):
                    right_OI = module.scaling["default"] * up_ERO[expert].T @ down_ERI[expert]
                    live = (found[name] - plain[name])[place]
                    live_OI = live.T if getattr(module.get_base_layer(), "is_transposed", False) else live
                    worst = max(worst, float((live_OI - right_OI).norm() / right_OI.norm()))
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for name, module in chosen.items():
                module.lora_B["default"].weight.copy_(kept[name])
    return worst


def _own(built: Any) -> float | None:
    """The coefficient in the model's config.json, `None` for a family whose loss has no such term."""
    from transformers import AutoConfig

    from soup.model.source import config
    from soup.rules.moe import is_balanced

    if not is_balanced(config(built.model_folder)):
        return None
    trust = built.config.model.trust_remote_code
    text = AutoConfig.from_pretrained(built.model_folder, trust_remote_code=trust).get_text_config()
    return getattr(text, "router_aux_loss_coef", None)


def _coefficients(built: Any) -> list[Any]:
    """Every coefficient that the trainer or the model could read."""
    trainer, model = built.trainer, built.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    places = (trainer, "router_aux_loss_coef"), (trainer, "aux_loss_coef"), (base, "router_aux_loss_coef")
    found = [vars(thing)[name] for thing, name in places if name in vars(thing)]
    return [*found, base.config.get_text_config().router_aux_loss_coef]


def _added(built: Any) -> tuple[float, float, float]:
    """What the balancing loss adds to the trainer's loss of its first rows, its formula's value, and rounding."""
    from soup.effects.task import first_batch
    from soup.effects.undisturbed import undisturbed

    trainer, model = built.trainer, built.model
    with undisturbed(built):
        batch = first_batch(built)
        with _listening(model) as passes:
            whole = trainer.compute_loss(model, dict(batch)).detach()
        with unbalanced(trainer):
            alone = trainer.compute_loss(model, dict(batch)).detach()
    top = model.config.get_text_config().num_experts_per_tok
    asked = [(seen, logits) for seen, logits, on in passes if on and logits]
    terms = [balancing_loss(logits, seen, top) for seen, logits in asked]
    room = 4 * torch.finfo(whole.dtype).eps * max(1.0, abs(float(whole)))
    if not terms:
        # Off, or dropped: what the routers say of any pass stands for it.
        terms = [balancing_loss(logits, seen, top) for seen, logits, _ in passes if logits][:1]
    return float(whole) - float(alone), sum(terms) / max(1, len(terms)), room


@contextmanager
def _listening(model: Any) -> Iterator[list[tuple[Tensor | None, list[Tensor], bool]]]:
    """For each pass through the decoder: which tokens are no padding, the routers' logits, and whether it gives
    them out.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = getattr(base, base.base_model_prefix)
    passes: list[tuple[Tensor | None, list[Tensor], bool]] = []

    def begins(_: Any, _args: Any, kwargs: Mapping[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        on = kwargs.get("output_router_logits")
        on = model.config.get_text_config().output_router_logits if on is None else on
        seen = None if mask is None or mask.dim() != 2 else mask.detach().reshape(-1).cpu()
        passes.append((seen, [], bool(on)))

    def routes(_: Any, _args: Any, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        passes[-1][1].append(logits.detach().reshape(-1, logits.shape[-1]).cpu())

    handles = [decoder.register_forward_pre_hook(begins, with_kwargs=True)]
    handles += [module.register_forward_hook(routes) for module in routers(model).values()]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
