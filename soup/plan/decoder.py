"""A decoder's layers and parameters, counted from its config.json; which of them get adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from soup.plan import mixture
from soup.rules.moe import experts, is_moe
from soup.schema import Config


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder's linear layers as (name, inputs, outputs, copies) of one layer, and what lies outside them.

    `dense`: numbers of the layers of an MoE model that have no experts, with linear layers of their own.
    """

    layers: int
    hidden: int
    heads: int  # width of all query heads
    kv: int  # width of all key heads
    ff: int  # width that one token passes
    vocab: int
    linears: tuple[tuple[str, int, int, int], ...]
    experts: int
    per_layer_other: int
    outside: int
    known: bool
    dense: tuple[int, ...] = ()
    dense_linears: tuple[tuple[str, int, int, int], ...] = ()
    dense_other: int = 0

    def layer(self, number: int) -> tuple[tuple[str, int, int, int], ...]:
        """The linear layers of one layer."""
        return self.dense_linears if number in self.dense else self.linears

    @property
    def linear(self) -> int:
        return sum(i * o * copies for number in range(self.layers) for _, i, o, copies in self.layer(number))

    @property
    def total(self) -> int:
        return self.bottom(self.layers) + self.outside

    def bottom(self, layers: int) -> int:
        """Parameters of the bottom layers."""
        linear = sum(i * o * copies for number in range(layers) for _, i, o, copies in self.layer(number))
        dense = sum(number < layers for number in self.dense)
        return linear + dense * self.dense_other + (layers - dense) * self.per_layer_other


KNOWN = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v3",
)


def shape(model: Mapping[str, Any]) -> Shape:
    """Reads a config.json; exact for the architectures in KNOWN, an estimate of a dense Llama for others."""
    model = model.get("text_config") or model
    kind = model.get("model_type", "")
    hidden = int(model.get("hidden_size") or model.get("n_embd") or 1024)
    layers = int(model.get("num_hidden_layers") or model.get("n_layer") or 1)
    heads = int(model.get("num_attention_heads") or model.get("n_head") or 1)
    width = int(model.get("head_dim") or hidden // heads)
    kv = int(model.get("num_key_value_heads") or heads) * width
    query = heads * width
    vocab = int(model.get("vocab_size") or 32000)
    ff = int(model.get("intermediate_size") or 4 * hidden)
    linears: list[tuple[str, int, int, int]] = [
        ("q_proj", hidden, query, 1),
        ("k_proj", hidden, kv, 1),
        ("v_proj", hidden, kv, 1),
        ("o_proj", query, hidden, 1),
    ]
    other = 2 * hidden  # norms
    if model.get("kv_lora_rank"):
        linears, norms, query = mixture.latent_attention(model, hidden, heads)
        other, kv = other + norms, query
    if kind == "olmoe":
        other += query + kv  # norms of q and k
    if kind == "qwen2" or kind == "qwen2_moe" and model.get("qkv_bias", True):
        other += query + 2 * kv  # biases of q, k and v
    if kind.startswith("qwen3"):
        other += 2 * width  # norms of q and k
    if model.get("attention_bias") and kind in ("llama", "mistral", "qwen3", "qwen3_moe"):
        other += query + 2 * kv + hidden
    if model.get("mlp_bias"):
        other += 2 * ff + hidden
    dense_linears: tuple[tuple[str, int, int, int], ...] = ()
    dense: tuple[int, ...] = ()
    dense_other = 0
    if is_moe(model):
        dense = mixture.dense_layers(model, layers)
        dense_linears, dense_other = (*linears, *mixture.gated("mlp.", hidden, ff)), other
        sparse, router, ff = mixture.feed_forward(model, hidden)
        linears, other = linears + sparse, other + router
    else:
        linears += mixture.gated("", hidden, ff)
    tied = bool(model.get("tie_word_embeddings", kind in ("gemma", "gemma2", "gemma3_text")))
    return Shape(
        layers=layers,
        hidden=hidden,
        heads=query,
        kv=kv,
        ff=ff,
        vocab=vocab,
        linears=tuple(linears),
        experts=experts(model),
        per_layer_other=other,
        outside=vocab * hidden * (1 if tied else 2) + hidden,
        known=kind in KNOWN,
        dense=dense,
        dense_linears=dense_linears,
        dense_other=dense_other,
    )


def adapter_parameters(config: Config, decoder: Shape) -> int:
    """Parameters of the adapters: A and B of each adapted layer above the frozen ones, and DoRA's magnitudes.

    An expert has an A and a B of its own beside each matrix that is fused.
    """
    spec = config.lora
    if spec.r is None:
        return 0
    total = 0
    for number in range(config.training.frozen(decoder.layers), decoder.layers):
        for name, inputs, outputs, copies in decoder.layer(number):
            if adapted(config, name):
                total += copies * spec.r * (inputs + outputs) + (outputs if spec.use_dora else 0)
    return total


def adapted(config: Config, name: str) -> bool:
    """Whether a linear layer, or fused experts, get adapters; `all-linear` passes an MoE model's MLPs by."""
    if name.startswith("experts."):
        return config.training.moe_lora
    wanted = config.lora.target_modules
    if wanted == "all-linear":
        return "." not in name
    return name in ((wanted,) if isinstance(wanted, str) else wanted)
