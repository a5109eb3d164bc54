"""Rows of 131,072 tokens, which really train in four processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

TOKENS = 131_072
MEMORY = 1.0e9  # bytes of each process; the libraries take 0.75e9
SENTENCE = "The lamp is lit, the log is written, and the sea goes on with its own business. "


@pytest.fixture(scope="module")
def narrow(tiny_model, tmp_path_factory):
    """The tiny model's tokenizer with one layer of one head of 8 numbers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("narrow") / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    config |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_row_of_131072_tokens_trains_in_four_processes(narrow, tmp_path):
    """As a user gives it. No warm-up: at a rate of 0 the first of two steps would teach nothing."""
    rows = tmp_path / "rows.jsonl"
    text = json.dumps({"text": SENTENCE * (TOKENS // 20)})
    rows.write_text(f"{text}\n{text}\n")
    words = [
        f"run.root={tmp_path / 'runs'}",
        "launch.device=cpu",
        "model=hub",
        f"model.base={narrow}",
        "model.dtype=float32",
        f"data.train={rows}",
        f"data.max_length={TOKENS}",
        "task=pretrain",
        "longctx=yarn",
        "longctx.use_ring_attention=true",
        "longctx.ring_size=4",
        "distributed=ddp",
        "distributed.processes=4",
        "lora=none",
        "training.batch_size=1",
        "training.max_steps=2",
        "training.logging_steps=1",
        "optim.lr=1e-2",
        "optim.warmup_ratio=0.0",
    ]
    command = [sys.executable, "-m", "soup", *words]
    one_thread = os.environ | {"OMP_NUM_THREADS": "4"}  # of four processes
    done = subprocess.run(command, env=one_thread, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/result.json"))
    first, second = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()[:2])
    assert (first["tokens"], second["tokens"]) == (TOKENS, 2 * TOKENS)
    assert second["loss"] < first["loss"]
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished" and result["peak_memory_bytes"] < MEMORY
    effects = json.loads((folder / "effective.json").read_text())
    assert [key for key, effect in effects.items() if not effect["ok"]] == []
