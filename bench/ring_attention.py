"""Activation memory of each process of a ring, and the longest row that fits in a given memory.

    .venv/bin/python bench/ring_attention.py [--tokens N] [--memory MB] [--layers N]

A random Llama (width 256, 4 heads, 2 of keys) passes one row forward and backward, cut for 1, 2 and 4 processes, each
of which reports by how much its peak resident memory grew over a row of a few tokens. The longest row that stays within
--memory a process is looked for between lengths that were measured, and is itself one of those. One process is torch's
attention.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))
WIDTH, VOCABULARY, CHUNK = 256, 512, 256
TRIES = 5  # lengths between one that fits and one that does not


def passes(rank: int, size: int, port: int, tokens: int, layers: int, pipe) -> None:
    """Sends how many bytes this process's peak grew by, the loss, and seconds."""
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.sft_trainer import _patch_chunked_ce_lm_head

    from soup.model import ring
    from soup.train.memory import peak_memory_bytes

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if size > 1:
        dist.init_process_group("gloo", rank=rank, world_size=size)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2**20,
        attn_implementation="ring" if size > 1 else "sdpa",
    )
    model = LlamaForCausalLM(config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    _patch_chunked_ce_lm_head(model, CHUNK)
    place = ring.make(size, "zigzag") if size > 1 else ring.Ring(1, 0, None, "zigzag")

    def step(length: int) -> float:
        cut = ring.Cut(place, length, (0,))
        at = torch.tensor(cut.positions)
        ids_1T = (torch.arange(length + 1) * 7919 % VOCABULARY)[None]
        with ring.laid(cut):
            loss = model(
                input_ids=ids_1T[:, at],
                position_ids=at[None],
                shift_labels=ids_1T[:, at + 1],
                num_items_in_batch=length,
            ).loss
            loss.backward()
        total = loss.detach()
        if size > 1:
            dist.all_reduce(total)
        return float(total)

    step(64)
    before = peak_memory_bytes()
    begun = time.monotonic()
    loss = step(tokens)
    pipe.send((peak_memory_bytes() - before, loss, time.monotonic() - begun))


def measured(size: int, tokens: int, layers: int) -> tuple[int, float, float]:
    """The largest growth of any process, the loss, and seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["soup.model.ring", "trl.trainer.sft_trainer"])
    started = []
    for rank in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(target=passes, args=(rank, size, port, tokens, layers, theirs))
        process.start()
        started.append((process, ours))
    found = [pipe.recv() for _, pipe in started]
    for process, _ in started:
        process.join()
    return max(grown for grown, _, _ in found), found[0][1], max(seconds for _, _, seconds in found)


def within(memory: float, size: int, layers: int, found: dict[int, int]) -> tuple[int, int]:
    """The longest row that was seen to fit, and its bytes. `found`: bytes by tokens, which this adds to."""
    for _ in range(TRIES):
        low = max((tokens for tokens, held in found.items() if held <= memory), default=0)
        high = min((tokens for tokens, held in found.items() if held > memory), default=4 * low)
        tokens = (low + high) // (4 * size) * 2 * size
        found[tokens], *_ = measured(size, tokens, layers)
    longest = max((tokens for tokens, held in found.items() if held <= memory), default=0)
    return longest, found.get(longest, 0)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16384, help="of the row that all measure")
    parser.add_argument("--memory", type=float, default=256.0, help="MB of activations in each process")
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    fits = f"longest in {args.memory:g} MB"
    print(f"{'processes':>9}{'tokens':>9}{'each':>10}{'loss':>9}{'s':>7}{fits:>24}{'each':>10}")
    first = loss_alone = None
    ok = True
    for size in (1, 2, 4):
        grown, loss, seconds = measured(size, args.tokens, args.layers)
        longest, held = within(args.memory * 1e6, size, args.layers, {args.tokens: grown})
        print(
            f"{size:>9}{args.tokens:>9}{grown / 1e6:>7.1f} MB{loss:>9.5f}{seconds:>7.1f}{longest:>24}"
            f"{held / 1e6:>7.1f} MB",
            flush=True,
        )
        first, loss_alone = first or grown, loss_alone or loss
        ok = ok and abs(loss - loss_alone) < 1e-4 and held >= 0.75 * args.memory * 1e6
        ok = ok and (size == 1 or grown * size < 1.6 * first)
    print("memory falls with the processes, losses agree" if ok else "not as claimed")
    return int(not ok)


if __name__ == "__main__":
    sys.exit(main())
