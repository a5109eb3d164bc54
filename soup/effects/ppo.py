"""PPO's settings, from an update of TRL's own loop on two prompts, in which nothing is learnt.

TRL's loop is one long method, so what it holds is read from its frame where it calls `accelerator.backward`, and the
policy is moved: off the reference before answers are drawn, and back where it would step first, which is off the
policy that drew them. All losses are then compared with the paper's, from log-probabilities, values and scores of each
sequence alone.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soup.effects import Effect, as_it_was, same
from soup.effects.losses import Row, generalized_advantages, ppo, ppo_rewards
from soup.effects.moe import every_expert
from soup.effects.quantization import tensors
from soup.effects.task import compared, logps, moved
from soup.effects.undisturbed import too_large, undisturbed
from soup.model.load import prompt_ids

PROMPTS = 2
FORMULA = ("kl_coef", "gamma", "lam", "cliprange", "vf_coef")


@dataclass(frozen=True)
class Rehearsal:
    """What TRL's loop did: the answers (token ids of prompt and answer), and the loss and policy of each pass.

    `drawn`, `reference`: log-probabilities of the answers by the policy that drew them and by the reference.
    """

    answers: list[tuple[list[int], list[int]]]
    width: int
    sampled: Any
    drawn: list[Row]
    reference: list[Row]
    passes: list[tuple[float, list[Row]]]


def update(built: Any) -> Iterator[Effect]:
    """The losses of every pass over two answers, and what those are drawn with."""
    trainer, tree = built.trainer, built.config.tree["task"]
    with _without_autocast(built), undisturbed(built), every_expert(built), _uncounted(trainer):
        seen = _rehearse(built)
        values = [
            _heads(trainer.value_model, *row)[: min(len(row[1]) + 1, seen.width)] for row in seen.answers
        ]
        scores = [_heads(trainer.reward_model, *row)[-1] for row in seen.answers]

    def formula(*, kl_coef: float, gamma: float, lam: float, cliprange: float, vf_coef: float) -> float:
        """Of all passes together, so that one number shows each knob."""
        rewards = ppo_rewards(seen.drawn, seen.reference, scores, width=seen.width, kl_coef=kl_coef)
        gained = [
            generalized_advantages(rewards_T, values_T, gamma=gamma, lam=lam)
            for rewards_T, values_T in zip(rewards, values, strict=True)
        ]
        losses = [
            ppo(policy, seen.drawn, gained, cliprange=cliprange, vf_coef=vf_coef) for _, policy in seen.passes
        ]
        return float(sum(losses))

    yield from compared(built, sum(loss for loss, _ in seen.passes), formula, formula)
    how = "what TRL's loop generates with"
    yield same("task.response_length", tree["response_length"], seen.sampled.max_new_tokens, how)
    heat = seen.sampled.temperature if seen.sampled.do_sample else 0.0
    near = abs(heat - tree["temperature"]) <= 1e-6  # TRL adds 1e-7
    yield Effect("task.temperature", tree["temperature"], heat, near, how)
    yield same("task.num_ppo_epochs", tree["num_ppo_epochs"], len(seen.passes), "passes over one answer")


def scorers(built: Any) -> Iterator[Effect]:
    """The reward and the value model: their score heads against those of the folders; no other part of them is new."""
    trainer, tree = built.trainer, built.config.tree["task"]
    for name, model in (("reward_model", trainer.reward_model), ("value_model", trainer.value_model)):
        folder = tree[name] or tree["reward_model"]
        live = model.score.weight.detach().float().cpu()
        stored = [
            read(slice(None)).float()
            for key, read in tensors(Path(folder).expanduser())
            if key.endswith("score.weight")
        ]
        ok = len(stored) == 1 and torch.allclose(live, stored[0], rtol=1e-2, atol=1e-3)
        how = f"its score head of {live.numel()} weights is that of {folder}"
        yield Effect(f"task.{name}", tree[name], folder if ok else "another model", ok, how)


class _Done(Exception):
    """The loop has seen all passes of its update."""


def _rehearse(built: Any) -> Rehearsal:
    """One update of TRL's loop on a copy of the trainer that has two prompts, and steps nothing."""
    from trl.experimental.ppo import PPOTrainer

    trainer = built.trainer
    prompts = [prompt_ids(built.tokenizer, trainer.train_dataset[i]["prompt"]) for i in range(PROMPTS)]
    passes: list[tuple[float, list[Row]]] = []
    held: dict[str, Any] = {}
    found: dict[str, list[Row]] = {}

    def measured(built: Any = built) -> list[Row]:
        heat = built.config.tree["task"]["temperature"]
        answers = _answers(prompts, held, trainer._pad, trainer.processing_class.eos_token_id)
        return [
            Row(answers={"completion": logps(built, prompt + answer, heat)[len(prompt) - 1 :]})
            for prompt, answer in answers
        ]

    def beforehand() -> list[Row]:  # there are no answers yet to move the policy by
        return [Row(answers={"prompt": logps(built, prompt)}) for prompt in prompts]

    def backward(loss: Tensor, **_: Any) -> None:
        if not passes:
            held.update(sys._getframe(1).f_locals)
            found["drawn"] = measured()
            with _reference(built) as frozen:
                found["reference"] = measured(frozen)
        passes.append((float(loss), measured()))

    def step(*_: Any, **__: Any) -> None:
        if len(passes) == 1:
            moves.close()

    def log(*_: Any, **__: Any) -> None:
        raise _Done

    shadow = copy.copy(trainer)
    shadow.args = copy.copy(trainer.args)
    shadow.args.per_device_train_batch_size = PROMPTS
    shadow.args.local_batch_size = shadow.args.local_mini_batch_size = shadow.args.batch_size = PROMPTS
    shadow.args.gradient_accumulation_steps = shadow.args.num_total_batches = 1
    shadow.dataloader = [trainer._padded([{"input_ids": prompt} for prompt in prompts])]
    shadow.accelerator = copy.copy(trainer.accelerator)
    shadow.accelerator.backward = backward
    shadow.accelerator.accumulate = lambda *_: nullcontext()
    shadow.optimizer = SimpleNamespace(step=step, zero_grad=lambda: None)
    shadow.callback_handler = SimpleNamespace(on_train_begin=lambda _args, _state, control: control)
    shadow.state = copy.copy(trainer.state)
    shadow.log = log
    with ExitStack() as moves, _numpy_as_it_was(), _evaluating(trainer.model):
        torch.manual_seed(0)
        moves.enter_context(moved(built.model, beforehand, beforehand(), True))
        with suppress(_Done):
            PPOTrainer.train(shadow)
    answers = _answers(prompts, held, trainer._pad, trainer.processing_class.eos_token_id)
    width = held["responses"].shape[1]
    return Rehearsal(answers, width, held["generation_config"], found["drawn"], found["reference"], passes)


def _answers(
    prompts: Sequence[list[int]], held: dict[str, Any], pad: int, end: int
) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each row; the answer with the token that ends it, and without what follows."""
    rows = []
    for prompt, tokens in zip(prompts, held["responses"].tolist(), strict=True):
        ends = [at + 1 for at, token in enumerate(tokens) if token == end]
        cut = min([*ends, *(at for at, token in enumerate(tokens) if token == pad), len(tokens)])
        rows.append((prompt, tokens[:cut]))
    return rows


def _heads(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """A scorer's number before each token of the answer and after the last, shape (T + 1,), in float64."""
    ids_1T = torch.tensor([prompt + answer], device=model.score.weight.device)
    decoder = getattr(model, model.base_model_prefix)
    hidden_TD = decoder(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T)).last_hidden_state[0]
    return model.score(hidden_TD[len(prompt) - 1 :])[:, 0].double().cpu()


@contextmanager
def _reference(built: Any) -> Iterator[Any]:
    """The same build with the reference for its model: adapters are off, or the frozen copy stands in for it."""
    if built.trainer.ref_model is None:
        with built.model.disable_adapter():
            yield built
        return
    yield SimpleNamespace(model=built.trainer.ref_model, trainer=built.trainer, config=built.config)


@contextmanager
def _without_autocast(built: Any) -> Iterator[None]:
    """No autocast in the passes of policy, reference and scorers, where `undisturbed` measures in 32 bits."""
    if too_large(built):
        yield
        return
    trainer, accelerator = built.trainer, built.trainer.accelerator
    amp, accelerator.native_amp = accelerator.native_amp, False
    prepared = vars(trainer.model).get("forward")
    if hasattr(trainer.model, "_original_forward"):
        trainer.model.forward = trainer.model._original_forward
    try:
        yield
    finally:
        accelerator.native_amp = amp
        if prepared is not None:
            trainer.model.forward = prepared


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout and noise, though the loop asks for them."""
    with as_it_was(model):
        model.eval()
        model.train = lambda _mode=True: model
        try:
            yield
        finally:
            del model.train


@contextmanager
def _uncounted(trainer: Any) -> Iterator[None]:
    """The trainer counts the tokens that its reward model sees."""
    state, trainer.state = trainer.state, copy.copy(trainer.state)
    try:
        yield
    finally:
        trainer.state = state


@contextmanager
def _numpy_as_it_was() -> Iterator[None]:
    """TRL draws the order of answers from numpy."""
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)
