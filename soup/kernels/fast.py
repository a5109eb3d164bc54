"""Puts soup's kernels on a trainer where they compute what the stock path does, and says where not, and why.

What is decided is decided by the objects that were built: the classes of their modules, and for rows without padding
by what a changed token moves (`_mixed`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from soup.kernels import attention, gate, head, lora, norm
from soup.kernels.answers import causal_models
from soup.schema import Config

# Kinds of attention layers that see a document as `attention` does.
LAYERS = {"full_attention", "sliding_attention"}
# Losses of log-probabilities of answers, by TRL's configuration: modules here, imported where their trainer is.
ANSWERS = {
    "trl:DPOConfig": "pairs",
    "trl:KTOConfig": "rated",
    "trl:GRPOConfig": "groups",
    "trl.experimental.orpo:ORPOConfig": "reference_free",
    "trl.experimental.cpo:CPOConfig": "reference_free",
}
JITTER = (
    "jitter_noise",
    "router_jitter_noise",
    "input_jitter_noise",
)  # of routers in transformers' MoE models
PARTS = ("norms", "gates", "adapters", "loss", "documents", "prefixes")


@dataclass(frozen=True)
class Part:
    """One kernel. `count`: modules that run it, 0 where it stays away because of `why`."""

    name: str
    count: int
    why: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.count})" if self.count else f"no {self.name}, because {self.why}"


def told(parts: Iterable[Part]) -> str:
    """What runs in a few words: soup's kernels, or why none does."""
    own = [part.name for part in parts if part.count]
    if own:
        return f"soup's {', '.join(own)}"
    return f"stock, because {' and '.join(dict.fromkeys(part.why for part in parts))}"


def put_on(trainer: Any, model: nn.Module, config: Config, implementation: str | None) -> tuple[Part, ...]:
    """Changes trainer and model in place; `implementation` is the attention that was chosen for the model.

    Models that a task trains beside it (PPO's value model) stay as they are.
    """
    if (why := _stock(config)) is not None:
        return tuple(Part(name, 0, why) for name in PARTS)
    norms, gates = _try("norms", norm.put_on, model), _try("gates", gate.put_on, model)
    adapters = _try("adapters", lambda: lora.put_on(model, gate.adapters(model)))
    answers = ANSWERS.get(config.task.config)
    losses: Any = head if answers is None else importlib.import_module(f"soup.kernels.{answers}")
    loss = _try("loss", losses.put_on, trainer)
    documents = _try("documents", lambda: _documents(trainer, config, implementation, loss))
    prefixes = _try("prefixes", lambda: _prefixes(trainer, config, loss, documents))
    return norms, gates, adapters, loss, documents, prefixes


def trains_rows(config: Config) -> bool:
    """Whether the task's rows are tokens with labels, and not pairs or prompts."""
    return config.task.config == "trl:SFTConfig"


def reads_answers(config: Config) -> bool:
    """Whether the task's loss is of log-probabilities of answers."""
    return config.task.config in ANSWERS


def draws_answers(config: Config) -> bool:
    """Whether it is of answers that the trainer has the policy generate."""
    return config.task.generates > 0


def _stock(config: Config) -> str | None:
    """Why the whole run goes the stock way."""
    if config.backend.kernels == "stock":
        return "backend.kernels=stock"
    if config.backend.unsloth:
        return "backend=unsloth"
    if config.training.use_liger:
        return "training.use_liger=true"
    if config.distributed.world > 1 or config.distributed.spread != "none":
        return "several processes share the run"
    if config.longctx.use_ring_attention:
        return "longctx.use_ring_attention=true"
    return None


def _try(name: str, put: Callable[..., int | str], *given: Any) -> Part:
    found = put(*given)
    return Part(name, 0, found) if isinstance(found, str) else Part(name, found)


def _documents(trainer: Any, config: Config, implementation: str | None, loss: Part) -> int | str:
    """Rows one after another without padding, and attention within each document; the number of layers, or why not."""
    if reads_answers(config) and not loss.count:
        return f"TRL's loss takes padded rows: {loss.why}"
    if not trains_rows(config) and not reads_answers(config):
        return f"task={config.tree['task']['name']} makes its batches itself"
    if implementation != "sdpa":
        return f"attention is {implementation}"
    models = causal_models(trainer)
    for model in models:
        if model.config._attn_implementation != implementation:
            return f"attention is {model.config._attn_implementation}"
    text = models[0].config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or LAYERS)
    if kinds - LAYERS or getattr(text, "attention_chunk_size", None):
        return f"{text.model_type} has layers of {', '.join(sorted(kinds))}"
    padded = trainer.data_collator
    free = getattr(
        padded, "padding_free", False
    )  # a collator of answers always pads, and `answers` takes that out
    if not free and (drawn := _drawn(trainer, config)) is not None:
        return f"{drawn} is drawn for padded rows"
    for model in models:
        model.set_attn_implementation(attention.NAME)
    whys = [why for model in models if (why := _mixed(model)) is not None]
    if whys:
        for model in models:
            model.set_attn_implementation(implementation)
        return whys[0]
    if trains_rows(config) and not free:
        trainer.eval_collator = padded  # a mean over batches of rows, as ever
        trainer.data_collator = replace(padded, padding_free=True)
    return text.num_hidden_layers


def _prefixes(trainer: Any, config: Config, loss: Part, documents: Part) -> int | str:
    """What documents of a row begin with alike is computed once from now on: 1, or why not."""
    for part in (documents, loss):
        if not part.count:
            return part.why
    if (drawn := _drawn(trainer, config)) is not None:
        return f"{drawn} is drawn for each token of each row"
    for model in causal_models(trainer):
        model.shares_prefixes = True
    return 1


def _drawn(trainer: Any, config: Config) -> str | None:
    """What draws numbers for tokens in a forward pass."""
    if config.training.neftune_alpha > 0:
        return "training.neftune_alpha"
    if any(getattr(module, name, None) for module in trainer.model.modules() for name in JITTER):
        return "the router's jitter"
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in trainer.model.modules()):
        return "dropout"
    if getattr(trainer.model.config.get_text_config(), "attention_dropout", None):
        return "attention_dropout"
    return None


def _mixed(model: Any) -> str | None:
    """Why documents of one row cannot be kept apart: a changed token of the first moves the second's hidden states,
    or the second's are not what they are alone; nor are those of a branch (`soup.kernels.prefixes`)."""
    from soup.effects import as_it_was

    device = next(model.parameters()).device
    one_T, two_T, branch_T = (torch.arange(*ends, device=device) for ends in ((2, 7), (3, 10), (11, 14)))
    first = 4  # of the second document's tokens the branch goes on from so many

    def states(*runs: tuple[torch.Tensor, int]) -> torch.Tensor:
        """(tokens, hidden) of a row of runs, each with its first position."""
        ids_1T = torch.cat([ids_T for ids_T, _ in runs])[None]
        places = [torch.arange(start, start + len(ids_T), device=device) for ids_T, start in runs]
        out = model.base_model(input_ids=ids_1T, position_ids=torch.cat(places)[None], use_cache=False)
        return out.last_hidden_state[0].float()

    with as_it_was(model), torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=False):
        model.eval()
        try:
            branched = states((two_T[:first], 0), (branch_T, first))[first:]
            alone = torch.cat([states((two_T, 0)), branched])
            together, moved = (
                states((one, 0), (two_T, 0), (branch_T, first))[len(one) :] for one in (one_T, one_T + 1)
            )
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            return f"{type(model).__name__} does not run without a mask: {str(error).splitlines()[0]}"
    exact = next(model.parameters()).dtype is torch.float32
    allowed = (1e-4 if exact else 0.03) * alone.abs().mean()
    if max((together - alone).abs().mean(), (together - moved).abs().mean()) > allowed:
        return f"{type(model).__name__} does not keep documents of one row apart"
    return None
