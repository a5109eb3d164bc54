"""What rows of a batch begin with alike: computed once, with the losses and gradients of every row by itself."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager

import pytest
import torch

from tests.train import test_fast, test_fast_answers

EXACT = ("model.dtype=float32", "training.batch_size=4", "data.eval_fraction=0")
JOBS = {
    "sft": ("task=sft", "lora=lora"),
    "sft, all weights": ("task=sft", "lora=none"),
    "recomputed": ("task=sft", "training.gradient_checkpointing=true"),
    "packed": ("task=sft", "training.packing=true", "training.batch_size=1", "data.max_length=400"),
    "pretraining": ("task=pretrain", "lora=lora"),
}
ANSWERS = {
    "dpo": ("task=dpo",),
    "dpo, a frozen copy": ("task=dpo", "lora=none"),
    "ipo": ("task=ipo",),
    "kto": ("task=kto",),
    "orpo": ("task=orpo",),
    "orpo, all weights": ("task=orpo", "lora=none"),
    "simpo": ("task=simpo",),
}
SYSTEM = {
    "role": "system",
    "content": "The keeper of the lamp answers briefly, and counts the hours of the night.",
}
ASKED = ("Is the lamp lit, and since when?", "What do you write at four?", "Who comes up the stairs?")
SAID = ("Since six, as ever.", "The wind, and that nobody came by.", "The cat. She comes at four, too.")


@pytest.fixture
def rows(tmp_path):
    """A file of conversations below one system message, some of them with one question, or of pairs."""

    def file(pairs):
        found = []
        for number in range(12):
            prompt = [SYSTEM, {"role": "user", "content": ASKED[number // 2 % 3]}]
            good, bad = SAID[number % 3], SAID[(number + 1) % 3] + f" {number}"
            if pairs:
                one = {"prompt": prompt} | {
                    side: [{"role": "assistant", "content": text}]
                    for side, text in (("chosen", good), ("rejected", bad))
                }
            else:
                one = {"messages": [*prompt, {"role": "assistant", "content": good}]}
            found.append(json.dumps(one))
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(found) + "\n")
        return f"data.train={path}"

    return file


@contextmanager
def embedded(model):
    """How many tokens the embedding is given in each pass, as they come."""
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _, given, __: seen.append(given[0].numel())
    )
    try:
        yield seen
    finally:
        hook.remove()


def passed(built):
    """Tokens of the first batch, and of them those that the embedding is given in a training pass."""
    trainer = built.trainer
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    built.model.train()
    with embedded(built.model) as seen:
        trainer.compute_loss(built.model, batch)
    masks = [value for name, value in batch.items() if name.endswith("attention_mask")]
    return sum(int(mask.sum()) for mask in masks) if masks else batch["input_ids"].numel(), seen


@pytest.mark.parametrize("words", JOBS.values(), ids=JOBS)
def test_rows_have_the_gradients_of_the_stock_path(build, rows, words):
    words = (*EXACT, "optim.lr=2e-3", rows(pairs=False), *words)
    tokens, seen = passed(build(*words))
    assert sum(seen) < 0.7 * tokens
    test_fast.same_step(build, *words)


@pytest.mark.parametrize("words", ANSWERS.values(), ids=ANSWERS)
def test_answers_have_the_gradients_of_the_stock_path(build, rows, words):
    words = (*EXACT, rows(pairs=True), *words)
    tokens, seen = passed(build(*words))
    passes = 2 if any(task in words for task in ("task=dpo", "task=ipo", "task=kto")) else 1
    assert sum(seen[:passes]) < 0.7 * passes * tokens
    assert test_fast_answers.same_step(build, *words)["prefixes"].count == 1


@pytest.mark.parametrize("words", [("lora.dropout=0.1",), ("training.neftune_alpha=5",)])
def test_what_is_drawn_for_each_token_is_not_shared(build, rows, words):
    packed = ("training.packing=true", "training.batch_size=1", "data.max_length=400")
    built = build(*EXACT, rows(pairs=False), *packed, *words)
    tokens, seen = passed(built)
    assert seen == [tokens]
    kernels = {part.name: part for part in built.kernels}
    assert kernels["documents"].count and "is drawn for each token" in kernels["prefixes"].why


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_inside_attention(build, tmp_path, packed):
    folder = tmp_path / "dropping"
    shutil.copytree(build().model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    words = ("training.packing=true", "training.batch_size=2") if packed else ()
    built = build(f"model.base={folder}", "model.dtype=float32", *words)
    kernels = {part.name: part for part in built.kernels}
    assert bool(kernels["documents"].count) == packed and not kernels["prefixes"].count
    assert "attention_dropout is drawn" in kernels["prefixes"].why
    if packed:  # in training, too, a token of one document does not reach another
        model = built.trainer.model.train()
        places_1T = torch.cat([torch.arange(5), torch.arange(7)])[None]
        ids_1T = torch.arange(20, 32)[None]
        moved_1T = ids_1T.clone()
        moved_1T[0, :5] += 1

        def second(ids, seed):
            torch.manual_seed(seed)
            return model(input_ids=ids, position_ids=places_1T, use_cache=False).logits[0, 5:]

        torch.testing.assert_close(second(moved_1T, 0), second(ids_1T, 0))
        assert not torch.allclose(second(ids_1T, 1), second(ids_1T, 0), atol=1e-3)


@pytest.mark.parametrize("words", [("task=sft",), ("task=sft", "training.packing=true"), ("task=dpo",)])
def test_evaluation_is_that_of_the_stock_path_without_its_padding(build, rows, words):
    words = ("model.dtype=float32", "data.eval_fraction=0.5", "training.batch_size=4", *words)
    found = []
    for kind in ("auto", "stock"):
        built = build(*words, rows(pairs="task=dpo" in words), f"backend.kernels={kind}")
        with embedded(built.model) as seen:
            found.append((built.trainer.evaluate(), sum(seen)))
    (metrics, tokens), (wanted, padded) = found
    assert tokens < 0.7 * padded
    measured = [name for name in wanted if not name.endswith(("time", "per_second"))]
    assert {name: metrics[name] for name in measured} == pytest.approx(
        {name: wanted[name] for name in measured}, rel=1e-4, abs=1e-5
    )
