"""How hard rows are for the model before it is trained: its loss on each, measured once and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from soup import cache
from soup.data.prepare import Prepared
from soup.device import Device
from soup.inputs import content
from soup.model.load import Precision
from soup.plan.memory import LOSS_TOKENS
from soup.schema import Config

SAID_S = 10.0  # seconds between two lines about how far it is


def base_loss(
    config: Config,
    prepared: Prepared,
    model: Any,
    folder: Path,
    precise: Precision,
    device: Device,
    say: Callable[[str], None],
) -> Any:
    """Mean loss of the model without adapters on the learnt tokens of each prepared row, shape (R,), float64, nats.

    Of a pair the answer that was chosen counts, after its prompt. `say` is told how far it is, and may raise to stop
    it; it is told nothing ("") after each batch. The numbers are kept under the content of all that they depend on: a
    resume, and the next run, read the same ones.
    """
    kept = cache.root() / "losses" / _key(config, prepared, folder, precise, device)
    with cache.entry(kept) as partial:
        if partial is not None:
            np.save(
                partial / "loss.npy", measure(prepared.open(), model, config.data.max_length, device, say)
            )
    loss_R = np.load(kept / "loss.npy")
    least, most = loss_R.min(), loss_R.max()
    say(f"curriculum: {len(loss_R)} rows by the base model's loss, {least:.3f} to {most:.3f} nats a token")
    return loss_R


def _key(config: Config, prepared: Prepared, folder: Path, precise: Precision, device: Device) -> str:
    tree = config.tree
    named = {
        "data": [prepared.fingerprint, prepared.split, config.data.max_length],
        "model": [content(config, folder)["model"], str(precise.weights), str(precise.autocast), device.kind],
        "settings": [
            {k: v for k, v in tree["model"].items() if k != "base"},
            tree["longctx"],
            tree["backend"],
        ],
        "kernels": [tree["training"]["use_liger"], tree["training"]["use_flash_attn"]],
        "versions": [version(name) for name in ("torch", "transformers")],
        "source": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:32]


def measure(file: Path, model: Any, max_length: int, device: Device, say: Callable[[str], None]) -> Any:
    """The losses, batch by batch of about equally long sequences, so that their order is always the same."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        table = pa.ipc.open_stream(source).read_all()
        pieces = _pieces(table, max_length)
        sum_R, count_R = np.zeros(len(table)), np.zeros(len(table))
        modes = {module: module.training for module in model.modules()}
        if device.kind != "cpu" and not getattr(model, "is_quantized", False):
            model.to(device.kind)
        without = model.disable_adapter() if hasattr(model, "peft_config") else nullcontext()
        cuda = [torch.cuda.current_device()] if device.kind == "cuda" else []
        try:
            model.eval()
            with torch.no_grad(), torch.random.fork_rng(devices=cuda), without:
                for batch in _told(list(_batches(pieces)), say):
                    rows = [_sequence(table, *pieces[number][:3]) for number in batch]
                    for number, (loss, count) in zip(batch, _losses(model, rows, device), strict=True):
                        sum_R[pieces[number][0]] += loss
                        count_R[pieces[number][0]] += count
        finally:
            for module, training in modes.items():
                module.training = training
                _scales_back(module)
    return sum_R / np.maximum(count_R, 1)


def _scales_back(module: Any) -> None:
    """bitsandbytes takes an 8-bit weight's scales off it at its first pass; if it is moved then they are lost."""
    state = getattr(module, "state", None)
    if getattr(state, "SCB", None) is not None:
        module.weight.CB, module.weight.SCB = state.CB, state.SCB
        state.CB = state.SCB = None


def _pieces(table: Any, max_length: int) -> list[tuple[int, int, int, int]]:
    """Row, first token, end and length of each sequence; a document that packing cuts is several."""
    import pyarrow.compute as pc

    names = ["input_ids"] if "input_ids" in table.column_names else ["prompt_ids", "chosen_ids"]
    length_R = sum(pc.list_value_length(table[name]).to_numpy() for name in names)
    return [
        (row, start, min(start + max_length, length), min(max_length, length - start))
        for row, length in enumerate(length_R.tolist())
        for start in range(0, length, max_length)
    ]


def _batches(pieces: Sequence[tuple[int, int, int, int]]) -> Iterator[list[int]]:
    """Numbers of pieces, the longest first, as many as make LOSS_TOKENS with their padding."""
    batch: list[int] = []
    for number in sorted(range(len(pieces)), key=lambda number: -pieces[number][3]):
        if batch and (len(batch) + 1) * pieces[batch[0]][3] > LOSS_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _told(batches: list[list[int]], say: Callable[[str], None]) -> Iterator[list[int]]:
    rows = sum(map(len, batches))
    say(
        f"curriculum: measuring the base model's loss of {rows} sequences, once for all runs with this model and data"
    )
    said, done = time.monotonic(), 0
    for batch in batches:
        yield batch
        done += len(batch)
        say("")  # to be stopped
        if time.monotonic() - said > SAID_S:
            said = time.monotonic()
            say(f"curriculum: {done} of {rows} sequences measured")


def _sequence(table: Any, row: int, start: int, end: int) -> tuple[Any, Any]:
    """Tokens, and which of them are learnt."""
    if "input_ids" in table.column_names:
        ids_T, labels_T = (table[name][row].values.to_numpy()[start:end] for name in ("input_ids", "labels"))
        return ids_T, labels_T != -100
    prompt_T, chosen_T = (table[name][row].values.to_numpy() for name in ("prompt_ids", "chosen_ids"))
    ids_T = np.concatenate([prompt_T, chosen_T])
    return ids_T[start:end], (np.arange(len(ids_T)) >= len(prompt_T))[start:end]


def _losses(model: Any, rows: Sequence[tuple[Any, Any]], device: Device) -> Iterator[tuple[float, int]]:
    """Sum of the negative log-likelihoods of each sequence's learnt tokens but its first, and how many those are."""
    longest = max(len(ids_T) for ids_T, _ in rows)
    ids_BT, mask_BT = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for place, (ids_T, _) in enumerate(rows):
        ids_BT[place, : len(ids_T)] = torch.from_numpy(ids_T.astype(np.int64))
        mask_BT[place, : len(ids_T)] = 1
    ids_BT = ids_BT.to(device.kind)
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT.to(device.kind), use_cache=False).logits
    for place, (_, learnt_T) in enumerate(rows):
        at = torch.from_numpy(np.flatnonzero(learnt_T[1:])).to(device.kind)
        logits_LV = logits_BTV[place, at].float()
        loss = torch.nn.functional.cross_entropy(logits_LV, ids_BT[place, at + 1], reduction="sum")
        yield float(loss), len(at)
