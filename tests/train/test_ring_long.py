"""Rows of 131,072 tokens, which really train in four processes."""

from __future__ import annotations

import json

import pytest

TOKENS = 131_072
MEMORY = 1.6e9  # bytes of each process; the libraries take 0.75e9


@pytest.fixture(scope="module")
def narrow(tiny_model, tmp_path_factory):
    """The tiny model's tokenizer with one layer of one head of 16 numbers."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("narrow") / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    config |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_row_of_131072_tokens_trains_in_four_processes(start, place, tree, narrow, tmp_path):
    sentence = "The lamp is lit, the log is written, and the sea goes on with its own business. "
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for _ in range(2):
            file.write(json.dumps({"text": sentence * (TOKENS // 20)}) + "\n")
    run = place(
        tree(
            f"model.base={narrow}",
            f"data.train={rows}",
            f"data.max_length={TOKENS}",
            "task=pretrain",
            "longctx=yarn",
            "longctx.use_ring_attention=true",
            "longctx.ring_size=4",
            "distributed=ddp",
            "distributed.processes=4",
            "lora=none",
            "model.dtype=float32",
            "training.batch_size=1",
            "training.max_steps=2",
            "training.logging_steps=1",
            "training.gradient_checkpointing=true",
            "optim.lr=1e-2",
        )
    )
    process = start(run)
    shown, _ = process.communicate(timeout=3000)
    assert process.returncode == 0, shown
    first, second = run.lines()[:2]
    assert first["tokens"] == TOKENS and second["tokens"] == 2 * TOKENS
    assert second["loss"] < first["loss"]
    assert json.loads((run.folder / "result.json").read_text())["peak_memory_bytes"] < MEMORY
    wrong = {key: one for key, one in json.loads(run.effective.read_text()).items() if not one["ok"]}
    assert wrong == {}
