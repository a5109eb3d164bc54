"""Whether rows are cut for a ring, and whether attention to a cut row is attention to the whole one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from soup.effects import Effect, same
from soup.effects.undisturbed import tolerance, undisturbed

SEEN = 24  # tokens of each process, of the row that passes the model
KEYS = ("use_ring_attention", "ring_size", "ring_layout")


def ring(built: Any) -> Iterator[Effect]:
    """Parts of the loader's first batch against the whole; outputs and gradients of a cut row against a whole one's.

    The row's loss is on what its last process holds, and reaches the others' tokens through the ring alone.
    """
    tree, trainer = built.config.tree["longctx"], built.trainer
    attention = str(getattr(built.model.config.get_text_config(), "_attn_implementation", None))
    if not tree["use_ring_attention"]:
        cut = hasattr(trainer, "ring") or "ring" in attention
        how = f"rows are {'cut' if cut else 'whole'}; attention: {attention}"
        for key in KEYS:
            yield Effect(f"longctx.{key}", tree[key], "cut" if cut else tree[key], not cut, how)
        return
    held, layout = _parts(built)
    try:
        off = _off(built)
    except Exception as error:  # noqa: BLE001, attention that cannot run is not in force
        off, why = float("inf"), f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        why = f"outputs and gradients of a cut row are {off:.2g} off those of the whole one"
    ok = off <= 10 * tolerance(built)
    how = f"{why}; attention: {attention}"
    yield Effect("longctx.use_ring_attention", True, ok if ok else "attention that differs", ok, how)
    how = f"each row of the loader's first batch lies in {held} processes, each token in one"
    yield same("longctx.ring_size", tree["ring_size"], held, how)
    yield same("longctx.ring_layout", tree["ring_layout"], layout, "the tokens that each process holds")


def _parts(built: Any) -> tuple[int, str]:
    """Processes that draw the rows that this one draws first, and the layout by which their parts are those rows."""
    from soup.train import ranks

    trainer, size = built.trainer, built.config.longctx.ring_size
    state = torch.get_rng_state()
    try:
        loader = trainer.get_train_dataloader()
        numbers = list(next(iter(deepcopy(loader.batch_sampler))))
    finally:
        torch.set_rng_state(state)
    rows = [trainer.train_dataset[number] for number in numbers]
    part_BT = loader.collate_fn([dict(row) for row in rows])["input_ids"]
    whole_BT = trainer.data_collator([dict(row) for row in rows])["input_ids"]
    everyone = ranks.gather((numbers, part_BT))
    ring = ranks.rank() // size
    own = everyone[ring * size : (ring + 1) * size]
    few = len(trainer.train_dataset) < len(everyone) // size * len(
        numbers
    )  # so that other rings have them again
    held = sum(drawn == numbers for drawn, _ in (own if few else everyone))
    parts = [part for _, part in own]
    for layout, chunks in (("contiguous", 1), ("zigzag", 2)):
        pieces = [part.tensor_split(chunks, 1) for part in parts]
        backward = [piece[1] for piece in reversed(pieces)] if chunks == 2 else []
        together = torch.cat([*(piece[0] for piece in pieces), *backward], 1)
        filled = together.shape[1] - whole_BT.shape[1]
        if 0 <= filled < chunks * size and torch.equal(together[:, : whole_BT.shape[1]], whole_BT):
            return held, layout
    return held, "other tokens than the rows have"


def _off(built: Any) -> float:
    """The largest difference of logits and of gradients with regard to embeddings, over their norms, of any process."""
    from soup.effects.moe import every_expert
    from soup.train import ranks

    trainer, model = built.trainer, built.model
    size = built.config.longctx.ring_size
    example = _row(built, SEEN * size)
    with undisturbed(built), every_expert(built):
        device = trainer.args.device
        cut = {k: v.to(device) for k, v in trainer.parts([dict(example)]).items()}
        whole = {k: v.to(device) for k, v in trainer.data_collator([dict(example)]).items()}
        last = SEEN * size - SEEN // 2  # of two chunks of a process, or of its only one
        whole_logits, whole_grad = _passed(model, whole, last, None)
        at = torch.tensor(trainer.positions(SEEN * size), device=device)
        with trainer.laid(cut):
            logits, grad = _passed(model, cut, last, at)
    pairs = ((logits, whole_logits[:, at]), (grad, whole_grad[:, at]))
    return max(ranks.gather(max(_apart(found, wanted) for found, wanted in pairs)))


def _apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))


def _row(built: Any, tokens: int) -> Mapping[str, Any]:
    """The first training row, of so many tokens; of two documents where rows are packed."""
    row = built.trainer.train_dataset[0]
    times = -(-tokens // len(row["input_ids"]))
    example = {name: (list(row[name]) * times)[:tokens] for name in ("input_ids", "labels")}
    return example | ({"seq_lengths": [tokens // 3, tokens - tokens // 3]} if "seq_lengths" in row else {})


def _passed(model: Any, batch: Mapping[str, Tensor], last: int, at: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits, and gradients with regard to the embeddings of what falls on the row's end; `at`: positions of a part."""
    ids_1T = batch["input_ids"]
    kept: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            named = {k: batch[k] for k in ("attention_mask", "position_ids") if k in batch}
            logits = model(input_ids=ids_1T, use_cache=False, **named).logits.float()
            place_T = torch.arange(ids_1T.shape[1], device=ids_1T.device) if at is None else at
            weight_TV = torch.cos(place_T[:, None] + torch.arange(logits.shape[-1], device=ids_1T.device))
            ((logits * weight_TV)[:, place_T >= last].sum() + 0 * logits.sum()).backward()
    finally:
        handle.remove()
    for parameter in model.parameters():
        parameter.grad = None
    return logits.detach(), kept[0].grad.float()
