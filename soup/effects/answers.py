"""How GRPO's answers are drawn, scored and compared: its trainer's own passes over answers that are made up here."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from soup.effects import Effect, same
from soup.effects.losses import Row
from soup.effects.moe import every_expert
from soup.effects.task import as_reference, logps, moved
from soup.effects.undisturbed import tolerance, undisturbed
from soup.model.load import prompt_ids
from soup.rewards import load, own_file

SAID = (
    "",
    "4",
    "A longer answer. The answer is 4.",
    '{"answer": 4}',
    "<think>2 + 2</think><answer>4</answer>",
)
NEAR, ROUNDED = 1e-3, 0.25  # nats a token, of the reference; where it is measured in 16 bits
EPSILON = 1e-4  # that TRL adds to a group's deviation
LOGGED = ("_metrics", "_logs", "_pending_extra_logs", "_pending_metrics")


def sampled(built: Any) -> Iterator[Effect]:
    """What the trainer asks the model to generate with, and how often the sampler repeats a prompt."""
    trainer, tree = built.trainer, built.config.tree["task"]
    found: dict[str, Any] = {}

    def generate(*_: Any, **given: Any) -> torch.Tensor:
        found.update(given, generation_config=copy.deepcopy(given.get("generation_config")))
        asked_BT = given["input_ids"]
        return torch.cat((asked_BT, asked_BT[:, -1:]), 1)  # an answer of one token

    prompt = trainer.train_dataset[0]["prompt"]
    model = trainer.model
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with undisturbed(built):
        try:
            inner.generate = generate
            trainer._generate([prompt] * 2)
        finally:
            del inner.generate
    settings = found.get("generation_config")
    how = "what the model is asked to generate answers with"
    longest = found.get("max_new_tokens", getattr(settings, "max_new_tokens", None))
    yield same("task.max_completion_length", tree["max_completion_length"], longest, how)
    heat = found.get("temperature", getattr(settings, "temperature", None))
    if not getattr(settings, "do_sample", False):
        heat = 0.0
    yield same("task.temperature", tree["temperature"], heat, how)
    drawn = list(trainer._get_train_sampler())
    run = next((i for i, row in enumerate(drawn) if row != drawn[0]), len(drawn))
    yield same("task.num_generations", tree["num_generations"], run, f"the sampler draws rows {drawn[:8]}")


def scored(built: Any) -> Iterator[Effect]:
    """Rewards, weights and groups, from the advantages that the trainer gives made-up answers to the first prompt, and
    the reference's log-probabilities that it holds them against."""
    trainer, tree = built.trainer, built.config.tree["task"]
    asked, names = list(tree["rewards"]), [function.__name__ for function in trainer.reward_funcs]
    size, row = tree["num_generations"], trainer.train_dataset[0]
    said = [*SAID, *(str(value) for name, value in row.items() if name != "prompt" and value is not None)]
    said = (said * size)[: size * -(-len(said) // size)]
    again = load(asked)
    alike = names == asked and all(map(_same_file, trainer.reward_funcs, again, asked))
    weights = (
        [1.0] * len(asked) if tree["reward_weights"] is None else list(map(float, tree["reward_weights"]))
    )
    given = {name: [value] * len(said) for name, value in row.items()}
    stand_ins = [_own(word, one, place) for place, (word, one) in enumerate(zip(asked, again, strict=True))]
    try:
        live, gap = _live(built, row, said)
        score_FN = torch.tensor(
            [[float("nan") if x is None else x for x in f(completions=_said(row, said), **_columns(given))]
             for f in stand_ins]
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001, what cannot be scored is not in force
        why = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        yield Effect("task.rewards", asked, "no scores", False, why)
        return
    right = advantages(score_FN, weights, size)
    off = float((live - right).abs().max()) if live.shape == right.shape else float("inf")
    ok = off <= 1e-3
    how = f"{len(said)} answers to the first prompt have advantages that are {off:.1e} off the formula's"
    other = "functions that the trainer calls; " + how
    yield Effect("task.rewards", asked, names if ok and alike else "other functions", ok and alike, other)
    held = trainer.reward_weights.tolist()
    near = len(held) == len(weights) and all(abs(a - b) < 1e-6 for a, b in zip(held, weights, strict=True))
    told = f"weights that the trainer multiplies rewards by; {how}"
    yield Effect("task.reward_weights", tree["reward_weights"], held, near and ok, told)
    if not ok:
        yield Effect("task.num_generations", size, "other groups or scores", False, how)
    if gap > (NEAR if tolerance(built) < NEAR else ROUNDED):
        told = f"log-probabilities of the reference that the trainer compares with are {gap:.1e} nats a token off"
        yield Effect("task.beta", tree["beta"], "another reference", False, told)


def advantages(score_FN: torch.Tensor, weights: Sequence[float], size: int) -> torch.Tensor:
    """Of N answers in groups of `size` (arXiv:2402.03300, section 4.1.2): the weighted sum of F rewards, less the
    group's mean, over its deviation; an answer that no reward applies to counts for nothing."""
    none_N = score_FN.isnan().all(0)
    total_N = (score_FN.double() * torch.tensor(weights, dtype=torch.float64)[:, None]).nansum(0)
    found = []
    for total_G, none_G in zip(total_N.split(size), none_N.split(size), strict=True):
        some = total_G[~none_G]
        deviation = some.std() if len(some) > 1 else torch.tensor(float("nan"), dtype=torch.float64)
        found.append(
            ((total_G - some.mean()) / (deviation + EPSILON)).masked_fill(none_G, 0.0).nan_to_num(0.0)
        )
    return torch.cat(found)


def _live(built: Any, row: Mapping[str, Any], said: Sequence[str]) -> tuple[torch.Tensor, float]:
    """The trainer's advantages of the answers, and how far its reference is off the policy before it was moved, in nats
    a token."""
    trainer, model = built.trainer, built.model
    prompt = prompt_ids(built.tokenizer, row["prompt"])
    ids = [built.tokenizer(text, add_special_tokens=False)["input_ids"] for text in said]
    ids = [
        one[: len(prompt)] or prompt[-1:] for one in ids
    ]  # an answer has a token, as the end of a row is one
    shadow = copy.copy(trainer)
    for name in LOGGED:
        setattr(shadow, name, copy.deepcopy(getattr(trainer, name)))
    words = built.config.tree["task"]["rewards"]
    shadow.reward_funcs = [
        _own(word, one, place)
        for place, (word, one) in enumerate(zip(words, trainer.reward_funcs, strict=True))
    ]
    shadow._generate = lambda _: (
        [prompt] * len(ids), ids, None, _said(row, said), None, {}, None, None
    )  # fmt: skip
    with undisturbed(built), every_expert(built):

        def measured() -> list[Row]:
            heat = built.config.tree["task"]["temperature"]
            return [
                Row(answers={"completion": logps(built, prompt + one, heat)[len(prompt) - 1 :]})
                for one in ids[:2]
            ]

        with as_reference(built):
            before = measured()
        with moved(model, measured, before, built.config.task.reference):
            model.training = True  # by which TRL knows how large groups are; its modules are in evaluation
            given = shadow._generate_and_score_completions([dict(row) for _ in said])
        reference = given.get("ref_per_token_logps")
        gap = 0.0
        if built.config.task.reference:
            gaps = [
                (reference[place, : len(ids[place])].double().cpu() - one.answers["completion"]).abs().mean()
                for place, one in enumerate(before)
            ]
            gap = float(max(gaps))
    return given["advantages"].double().cpu(), gap


def _said(row: Mapping[str, Any], said: Sequence[str]) -> list[Any]:
    """The answers as TRL hands them to rewards: messages where the prompt is messages."""
    if isinstance(row["prompt"], str):
        return list(said)
    return [[{"role": "assistant", "content": text}] for text in said]


def _columns(given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        ("prompts" if name == "prompt" else name): values
        for name, values in given.items()
        if name != "completion"
    }


def _own(word: str, function: Any, place: int) -> Any:
    """A user's own reward may cost money or draw numbers: another of its name stands in for it."""
    if own_file(word) is None:
        return function

    def stand_in(completions: Sequence[Any], **_: Any) -> list[float]:
        return [float((number + place) % 3) for number in range(len(completions))]

    stand_in.__name__ = word
    return stand_in


def _same_file(live: Any, anew: Any, word: str) -> bool:
    """Whether a user's own reward is the function of that file, as it is now."""
    return own_file(word) is None or getattr(live, "__wrapped__", None) is anew.__wrapped__
