"""Which attention kernels a run takes, and why: FlashAttention where it can run, else torch's. No torch at import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soup.device import Device
from soup.errors import Problem, Refused
from soup.specs import ModelSpec

if TYPE_CHECKING:
    from soup.model.load import Precision
    from soup.schema import Config

KEY = "training.use_flash_attn"
RING_KEY = "longctx.use_ring_attention"
OLDEST = (2, 4, 1)  # of flash-attn: the first whose backward pass can be repeated to the bit


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """One version of FlashAttention. `devices`: CUDA compute capabilities, from the first to below the second."""

    implementation: str  # transformers' name
    distribution: str
    module: str
    devices: tuple[tuple[int, int], tuple[int, int]]
    needs: str


# The newest first. Kernels from the hub are code from the network: soup takes what is installed, and nothing else.
FLASH = {
    "v3": Kernels(
        implementation="flash_attention_3",
        distribution="flash-attn-3",
        module="flash_attn_interface",
        devices=((9, 0), (10, 0)),
        needs="a Hopper GPU",  # arXiv:2407.08608
    ),
    "v2": Kernels(
        implementation="flash_attention_2",
        distribution="flash-attn",
        module="flash_attn",
        devices=((8, 0), (100, 0)),
        needs="an Ampere GPU or a newer one",  # arXiv:2307.08691
    ),
}
RING = "ring"  # as transformers knows soup.model.ring
LARGEST_HEAD = 256  # elements of one head that either has kernels for
HEADS_OF = 8  # elements: both read heads in pieces of 16 bytes


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What the choice depends on; `None` is not known, and keeps nothing from running.

    `capability`: the GPU's. `broken`: for each version of FlashAttention, why it cannot be imported, `None` if it can.
    `dtype`: of matrix products. `head`: elements of one head. `dropout`: on attention weights while training.
    `model`: the class; `flash`, `sdpa`: whether it has that attention in transformers.
    """

    device: str
    capability: tuple[int, int] | None = None
    broken: Mapping[str, str | None] | None = None
    dtype: str | None = None
    head: int | None = None
    dropout: float = 0.0
    model: str = "this model"
    flash: bool | None = None
    sdpa: bool | None = None


@dataclass(frozen=True)
class Choice:
    """An attention implementation by transformers' name."""

    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation}, because {self.reason}"


def choose(asked: str, situation: Situation) -> Choice:
    """What `training.use_flash_attn` comes to: auto takes the newest that can run.

    Raises:
        Refused: a version was asked for that cannot run.
    """
    if asked in FLASH:
        if (why := obstacle(asked, situation)) is not None:
            raise Refused(Problem(key=KEY, value=asked, why=why, fix=f"{KEY}=auto"))
        return Choice(FLASH[asked].implementation, f"{KEY}={asked}")
    reasons = []
    if asked == "auto":
        for name, kernels in FLASH.items():
            if (why := obstacle(name, situation)) is None:
                reasons.append("it is the newest that can run")
                return Choice(kernels.implementation, "; ".join(dict.fromkeys(reasons)))
            reasons.append(why)
    else:
        reasons.append(f"{KEY}={asked}")
    if situation.sdpa is False:
        reasons.append(f"{situation.model} has no scaled_dot_product_attention in transformers")
        return Choice("eager", "; ".join(dict.fromkeys(reasons)))
    return Choice("sdpa", "; ".join(dict.fromkeys(reasons)))


def obstacle(name: str, situation: Situation) -> str | None:
    """What keeps this version of FlashAttention from running there, `None` if nothing is known to."""
    kernels, first, end = FLASH[name], *FLASH[name].devices
    if situation.device != "cuda":
        return "no CUDA device"
    if situation.broken is not None and (why := situation.broken[name]) is not None:
        return why
    if situation.capability is not None and not first <= situation.capability < end:
        found = ".".join(map(str, situation.capability))
        return f"{kernels.distribution} needs {kernels.needs}, and this one's compute capability is {found}"
    if situation.dtype is not None and situation.dtype not in ("float16", "bfloat16"):
        return f"FlashAttention computes in 16 bits, and this model's products are {situation.dtype}"
    if situation.flash is False:
        return f"{situation.model} has no FlashAttention in transformers"
    if situation.head is not None and (situation.head > LARGEST_HEAD or situation.head % HEADS_OF):
        sizes = f"heads of up to {LARGEST_HEAD} in steps of {HEADS_OF}"
        return f"FlashAttention has {sizes}, and this model's have {situation.head}"
    if name == "v3" and situation.dropout > 0:
        return f"FlashAttention 3 has no dropout, and config.json asks for {situation.dropout:g}"
    return None


def missing(name: str) -> str | None:
    """Why this version's package is not there to be imported, from its metadata."""
    distribution = FLASH[name].distribution
    try:
        found = version(distribution)
    except PackageNotFoundError:
        return f"{distribution} is not installed"
    if name == "v2" and tuple(int(part) for part in found.split(".")[:3] if part.isdigit()) < OLDEST:
        return f"{distribution} {found} is older than {'.'.join(map(str, OLDEST))}"
    return None


def described(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of heads and dropout, as arguments of Situation."""
    model = model.get("text_config") or model
    heads = model.get("num_attention_heads") or model.get("n_head")
    hidden = model.get("hidden_size") or model.get("n_embd")
    head = model.get("head_dim") or (int(hidden) // int(heads) if heads and hidden else None)
    if model.get("qk_rope_head_dim"):  # DeepSeek's latent attention
        head = int(model.get("qk_nope_head_dim") or 0) + int(model["qk_rope_head_dim"])
    dropout = model.get("attention_dropout") or model.get("attn_pdrop") or 0.0
    return {"head": head, "dropout": float(dropout)}


def refuse_unfit(asked: str, model: Mapping[str, Any], device: str, dtype: str | None) -> None:
    """Refuses a version that this config.json or dtype keeps from running, whatever the machine has."""
    if asked in FLASH:
        choose(asked, Situation(device=device, dtype=dtype, **described(model)))


def asked(config: Config) -> str:
    """`training.use_flash_attn`, or that rows are cut for a ring."""
    return RING if config.longctx.use_ring_attention else config.training.use_flash_attn


def attend(
    asked: str, folder: Path, spec: ModelSpec, precise: Precision, device: Device, head: str = "causal"
) -> Choice:
    """The choice for the model in `folder` on this machine, in the training process.

    Raises:
        Refused: as `choose` does.
    """
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    kind = _class(config, folder, spec, head)
    if asked == RING:
        return _ring(config, kind)
    on_gpu = device.kind == "cuda"
    products = precise.autocast or precise.weights
    situation = Situation(
        device=device.kind,
        capability=torch.cuda.get_device_capability() if on_gpu else None,
        broken={name: _broken(name) for name in FLASH} if on_gpu else None,
        dtype=str(products).removeprefix("torch."),
        model=getattr(kind, "__name__", "this model"),
        flash=_has_flash(kind),
        sdpa=getattr(kind, "_supports_sdpa", True),
        **described(config.to_dict()),
    )
    return choose(asked, situation)


def _ring(config: Any, kind: Any) -> Choice:
    """Ring attention, which transformers has by then, where the class asks transformers for its attention."""
    import soup.model.ring  # noqa: F401, registers it
    from soup.model.ring_fit import refuse_unfit

    refuse_unfit(config.to_dict())
    if kind is not None and not getattr(kind, "_supports_attention_backend", False):
        why = f"{kind.__name__} does not take its attention from transformers' interface"
        raise Refused(Problem(key=RING_KEY, value="true", why=why, fix=f"{RING_KEY}=false, or another model"))
    return Choice(RING, f"{RING_KEY}=true")


def _class(config: Any, folder: Path, spec: ModelSpec, head: str) -> Any:
    """The class that will be built, `None` where there is none: loading says so."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.auto_factory import _get_model_class

    auto = AutoModelForSequenceClassification if head == "score" else AutoModelForCausalLM
    own = (getattr(config, "auto_map", None) or {}).get(auto.__name__)
    if own is not None and spec.trust_remote_code:
        return get_class_from_dynamic_module(own, folder)
    known = type(config) in auto._model_mapping
    return _get_model_class(config, auto._model_mapping) if known else None


def _has_flash(kind: Any) -> bool:
    """Whether the class has FlashAttention, and not in a variant of its own only (GPT-OSS with its sinks)."""
    own = getattr(kind, "_compatible_flash_implementations", None)
    return bool(getattr(kind, "_supports_flash_attn", False)) and own is None


def _broken(name: str) -> str | None:
    """Why this version cannot be imported here: a wheel for another torch or CUDA is installed, and does not load."""
    import importlib

    if (why := missing(name)) is not None:
        return why
    try:
        importlib.import_module(FLASH[name].module)
    except (ImportError, OSError) as error:
        return f"{FLASH[name].distribution} does not import: {str(error).strip().splitlines()[0]}"
    return None
