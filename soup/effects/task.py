"""The task's own settings, from the loss that the trainer really computes on rows of its own data set.

The trainer's number is compared with `soup.effects.losses` in float64, on log-probabilities that are measured here,
one sequence at a time, without the trainer's collator, padding or masks. Where the loss has a reference, one
parameter of the policy is moved while both are computed and put back after, since a policy that equals its reference
has the same loss whatever beta is.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from soup.effects import Effect, losses
from soup.effects.losses import Row
from soup.effects.moe import every_expert, unbalanced
from soup.effects.sources import brief, held
from soup.effects.undisturbed import tolerance, undisturbed
from soup.model.load import prompt_ids
from soup.model.rope import FOLLOW

ROWS = 3
TOKENS = 64  # whose logits are taken in float64 at once
ADVANTAGES = torch.tensor([1.0, -0.5])  # of the two answers that GRPO's loss is computed on
MOVES = (1e-3, 1e-2, 1e-1, 1.0)  # of the parameter: the first that moves a log-probability far enough
MOVED = 2.0  # nats
SIDES = {  # of columns with token ids, and what a row's sides are called
    "chosen_ids": "chosen",
    "rejected_ids": "rejected",
    "completion_ids": "completion",
    "KL_completion_ids": "mismatched",
}
TABLE = {  # of columns with the reference's log-probabilities, summed, and the sides they are of
    "ref_chosen_logps": "chosen",
    "ref_rejected_logps": "rejected",
    "ref_logps": "completion",
    "ref_KL_logps": "mismatched",
}
ROUNDING = 0.05  # nats a token, of a table that is made with products of 16 bits


def loss(built: Any) -> Iterator[Effect]:
    """The trainer's loss, or why it cannot be computed: a run that would fail at its first step is refused before."""
    try:
        yield from _loss(built)
    except Exception as error:  # noqa: BLE001
        name = built.config.tree["task"]["name"]
        yield Effect("task.name", name, "no loss", False, f"{type(error).__name__}: {error}".splitlines()[0])


def _loss(built: Any) -> Iterator[Effect]:
    """The trainer's loss on the first rows against the paper's, and for each knob that another value would show."""
    trainer, model = built.trainer, built.model
    formula = getattr(losses, built.config.tree["task"]["name"])
    with undisturbed(built), unbalanced(trainer), every_expert(built):
        examples = [brief(built, row) for row in first_rows(held(built))]
        if built.config.longctx.rope_scaling_type in FOLLOW and "label" not in examples[0]:
            examples = examples[
                :1
            ]  # its frequencies are those of the longest row, which another row alone has not
        batch = _collated(trainer, examples)

        def measured() -> Iterator[Row]:
            return (_row(built, part) for example in examples for part in documents(example))

        with as_reference(built):
            reference = list(measured())
        if built.config.task.precompute_ref:
            reference = [_of_table(row, one) for row, one in zip(reference, examples, strict=True)]
        off = moved(model, measured, reference, built.config.task.reference)
        gradients = built.config.backend.unsloth  # which computes another way without
        with off as policy, torch.set_grad_enabled(gradients):
            live = float(trainer.compute_loss(model, batch).detach())
    yield from compared(built, live, lambda **knobs: float(formula(policy, reference, **knobs)), formula)


def _of_table(row: Row, example: Mapping[str, Any]) -> Row:
    """The row with the sums of log-probabilities that its table has, which are rounded as training rounds them."""
    answers = {
        side: row.answers[side] + (example[column] - row.answers[side].sum()) / len(row.answers[side])
        for column, side in TABLE.items()
        if column in example
    }
    return replace(row, answers=row.answers | answers)


def first_batch(built: Any) -> dict[str, Any]:
    """What the trainer's loss takes, of its first rows; for GRPO of made-up answers to the first prompt."""
    if built.config.task.generates:
        prompt, answers = made_up(built)
        frozen = [torch.zeros(len(answer)) for answer in answers]
        return _group(built, prompt, answers, frozen)
    return dict(_collated(built.trainer, [brief(built, row) for row in first_rows(held(built))]))


def _collated(trainer: Any, examples: Sequence[Mapping[str, Any]]) -> Any:
    return trainer._prepare_inputs(trainer.data_collator([dict(example) for example in examples]))


def group_loss(built: Any) -> Iterator[Effect]:
    """GRPO's loss on two made-up answers of different lengths to the first prompt, one good and one bad."""
    trainer, model = built.trainer, built.model
    tree = built.config.tree["task"]
    prompt, answers = made_up(built)
    with undisturbed(built), unbalanced(trainer), every_expert(built):

        def measured() -> list[Row]:
            heat = tree["temperature"]
            return [
                Row(answers={"completion": logps(built, prompt + answer, heat)[len(prompt) - 1 :]})
                for answer in answers
            ]

        reference = measured()
        with moved(model, measured, reference, built.config.task.reference) as policy:
            inputs = _group(built, prompt, answers, [row.answers["completion"] for row in reference])
            live = float(trainer.compute_loss(model, inputs))

    def formula(**knobs: Any) -> float:
        return float(losses.grpo(policy, reference, advantages=ADVANTAGES, **knobs))

    yield from compared(built, live, formula, losses.grpo)


def made_up(built: Any) -> tuple[list[int], list[list[int]]]:
    """Tokens of the first prompt, and of two answers of different lengths."""
    prompt = prompt_ids(built.tokenizer, built.trainer.train_dataset[0]["prompt"])
    return prompt, [(prompt * 5)[:5], (prompt * 3)[-3:]]


def _group(
    built: Any, prompt: list[int], answers: list[list[int]], reference: Sequence[Tensor]
) -> dict[str, Any]:
    """What GRPO's loss takes of a group of answers; `reference`: the reference's log-probabilities of each."""
    longest = max(map(len, answers))
    frozen = torch.zeros(len(answers), longest)
    for place, logps_T in enumerate(reference):
        frozen[place, : len(logps_T)] = logps_T.float()
    inputs = {
        "prompt_ids": torch.tensor([prompt] * len(answers)),
        "prompt_mask": torch.ones(len(answers), len(prompt), dtype=torch.long),
        "completion_ids": torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers]),
        "completion_mask": torch.tensor(
            [[1] * len(answer) + [0] * (longest - len(answer)) for answer in answers]
        ),
        "advantages": ADVANTAGES,
        "ref_per_token_logps": frozen,
        # Of all processes, which are given the same here.
        "num_items_in_batch": torch.tensor(sum(map(len, answers)) * built.trainer.accelerator.num_processes),
    }
    return {name: value.to(built.trainer.args.device) for name, value in inputs.items()}


def reference(built: Any) -> Iterator[Effect]:
    """Where the reference's log-probabilities come from: adapters off, a frozen copy, or a table made before."""
    trainer = built.trainer
    asked = built.config.task.precompute_ref
    rows = held(built)
    columns = [name for name in rows.column_names if name.startswith("ref_")]
    copy = trainer.ref_model
    how = "the model with its adapters off"
    ok = True
    if columns:
        places = sorted({0, len(rows) // 2, len(rows) - 1})
        with undisturbed(built):
            looked = [(rows[place], _row(built, rows[place])) for place in places]
        rounds = built.precision.autocast is not None
        gaps, fits = [], []
        for (example, row), (column, side) in itertools.product(looked, TABLE.items()):
            if column in columns:
                logps_T = row.answers[side]
                gaps.append(abs(example[column] - float(logps_T.sum())))
                rounding = ROUNDING * math.sqrt(len(logps_T)) if rounds else 0.0
                fits.append(gaps[-1] <= rounding + tolerance(built) * max(1.0, abs(example[column])))
        ok = copy is None and bool(fits) and all(fits)
        how = f"columns {', '.join(columns)}; those of {len(places)} rows are right to {max(gaps):.1e} nats"
    elif copy is not None:
        shared = {id(p) for p in copy.parameters()} & {id(p) for p in built.model.parameters()}
        ok = not shared and not copy.training
        how = f"a frozen copy of {sum(p.numel() for p in copy.parameters()):,} parameters"
    yield Effect("task.precompute_ref", asked, bool(columns), ok and bool(columns) == asked, how)


def compared(built: Any, live: float, formula: Any, signature: Any) -> Iterator[Effect]:
    """The live loss against the formula's, and for each of its keyword knobs whether another value would show."""
    tree = built.config.tree["task"]
    named = [p.name for p in inspect.signature(signature).parameters.values() if p.kind is p.KEYWORD_ONLY]
    knobs = {name: tree[name] for name in named if name in tree}
    expected = formula(**knobs)
    allowed = tolerance(built) * max(1.0, abs(expected))
    ok = abs(live - expected) <= allowed
    told = f"the trainer's loss is {live:.6f}, the paper's {expected:.6f}"
    yield Effect("task.name", tree["name"], tree["name"] if ok else "another loss", ok, told)
    for name, value in knobs.items():
        shows = False
        if isinstance(value, float):
            other = formula(**(knobs | {name: value * 0.75 + 0.05}))
            shows = abs(other - expected) > 3 * allowed
        how = told + (f"; with another {name} it would be {other:.6f}" if shows else "")
        yield Effect(f"task.{name}", value, value if ok else "unknown", ok, how)


def first_rows(rows: Any) -> list[Mapping[str, Any]]:
    """The first rows; where rows have labels, both kinds of them."""
    first = list(range(min(ROWS, len(rows))))
    if "label" in rows.column_names:
        labels = rows["label"]
        first = [i for i in (_first(labels, True), _first(labels, False)) if i is not None] + first[-1:]
    return [rows[i] for i in first]


def _first(values: Sequence[Any], wanted: Any) -> int | None:
    return next((i for i, value in enumerate(values) if value == wanted), None)


def documents(example: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The documents of a packed row; another row is one of its own."""
    if "seq_lengths" not in example:
        yield example
        return
    start = 0
    for length in example["seq_lengths"]:
        yield {name: example[name][start : start + length] for name in ("input_ids", "labels")}
        start += length


def _row(built: Any, example: Mapping[str, Any]) -> Row:
    """The model's log-probabilities of a row, by the columns that it has."""
    if "input_ids" in example:
        learnt = torch.tensor(example["labels"][1:]) != -100
        return Row(answers={"completion": logps(built, example["input_ids"])[learnt]})
    sides = {SIDES[name]: ids for name, ids in example.items() if name in SIDES}
    if built.config.task.head == "score":
        return Row(score={side: _score(built, ids) for side, ids in sides.items()})
    prompt = example["prompt_ids"]
    limit = built.config.data.max_length
    whole = {side: logps(built, (prompt + ids)[:limit]) for side, ids in sides.items()}
    answers = {side: whole_T[len(prompt) - 1 :] for side, whole_T in whole.items()}
    return Row(answers=answers, whole=whole, label=bool(example.get("label", True)))


def logps(built: Any, ids: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Log-probabilities of each token but the first, shape (T - 1,), in float64."""
    ids_1T = torch.tensor([list(ids)], device=built.trainer.args.device)
    with torch.no_grad():
        logits_TV = built.model(input_ids=ids_1T).logits[0, :-1]
    next_T1 = ids_1T[0, 1:, None].cpu()
    parts = zip(logits_TV.split(TOKENS), next_T1.split(TOKENS), strict=True)
    return torch.cat(
        [
            (some.double().cpu() / temperature).log_softmax(-1).gather(1, chosen)[:, 0]
            for some, chosen in parts
        ]
    )


def _score(built: Any, ids: Sequence[int]) -> Tensor:
    ids_1T = torch.tensor([list(ids)], device=built.trainer.args.device)
    with torch.no_grad():
        return built.model(input_ids=ids_1T).logits[0, 0].double().cpu()


@contextmanager
def as_reference(built: Any) -> Iterator[None]:
    """Adapters off, where those are what the reference lacks: DoRA's magnitudes begin as the weights' norms rounded."""
    if not built.config.task.reference or built.config.lora.r is None:
        yield
        return
    with built.model.disable_adapter():
        yield


@contextmanager
def moved(
    model: Any, measured: Callable[[], Iterable[Row]], before: list[Row], needed: bool
) -> Iterator[list[Row]]:
    """The policy's rows with one parameter moved off the reference, as far as it takes for the first row; not moved
    where there is no reference."""
    if not needed:
        yield before
        return
    parameter = [p for p in model.parameters() if p.requires_grad][-1]
    kept = parameter.detach().clone()
    wave = torch.sin(torch.arange(parameter.numel(), device=parameter.device)).view_as(parameter)
    try:
        for size in MOVES:
            parameter.copy_(kept + (size * wave).to(parameter.dtype))
            new, old = next(iter(measured())).answers, before[0].answers
            if max(abs(float((new[side] - old[side]).sum())) for side in new) > MOVED:
                break
        yield list(measured())
    finally:
        with torch.no_grad():
            parameter.copy_(kept)
