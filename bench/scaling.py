"""How cost grows with sequence length and with model width: tokens per second and peak memory, soup and stock.

    .venv/bin/python bench/scaling.py [--quick] [--lengths 256,1024,4096,16384] [--widths 256,576,1024] [--json FILE]

Random Llama models of 4 layers and SmolLM2's vocabulary, with adapters of rank 16, on rows that have exactly so many
tokens, 2 rows a step; each point is two steps in a process of its own, of which the second counts. `stock` is
backend.kernels=stock: TRL's own path. Where a run fails (memory), the line says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
MODEL = """
import json, shutil, sys
from transformers import LlamaConfig, LlamaForCausalLM
source, folder, width = sys.argv[1], sys.argv[2], int(sys.argv[3])
shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
LlamaForCausalLM(LlamaConfig(
    vocab_size=49152, hidden_size=width, intermediate_size=width * 8 // 3 // 64 * 64, num_hidden_layers=4,
    num_attention_heads=width // 64, num_key_value_heads=max(1, width // 192), head_dim=64,
    max_position_embeddings=65536, tie_word_embeddings=True,
)).save_pretrained(folder)
"""
WORDS = "the lamp is lit and the log is written while the sea goes on with its own business "


def measure(model: Path, kernels: str, length: int, folder: Path) -> dict[str, Any]:
    rows = folder / f"rows{length}.jsonl"
    if not rows.exists():
        text = WORDS * (length // 8)  # more tokens than the row takes: it is cut to data.max_length
        # Numbered: rows that begin alike would be computed once.
        numbered = [json.dumps({"text": f"{number} {text}"}) for number in range(8)]
        rows.write_text("\n".join(numbered) + "\n")
    root = folder / f"{model.name}-{kernels}-{length}"
    words = [
        "model=hub",
        f"model.base={model}",
        "task=pretrain",
        f"data.train={rows}",
        f"data.max_length={length}",
        f"backend.kernels={kernels}",
        "data.eval_fraction=0",
        "training.batch_size=2",
        "training.max_steps=2",
        "training.logging_steps=1",
        "launch.device=cpu",
        f"run.root={root}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "soup", *words], cwd=CHECKOUT, capture_output=True, text=True
    )
    if done.returncode:
        return {"error": (done.stdout + done.stderr).strip().splitlines()[-1]}
    (metrics,) = root.glob("*/metrics.jsonl")
    last = json.loads(metrics.read_text().splitlines()[-1])
    return {name: last[name] for name in ("tokens_per_s", "peak_memory_bytes")}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="256,1024,4096,16384")
    parser.add_argument("--widths", default="192,576,1152")
    parser.add_argument("--quick", action="store_true", help="two lengths, one width")
    parser.add_argument("--json", help="a file for the numbers")
    args = parser.parse_args()
    if args.quick:
        args.lengths, args.widths = "256,1024", "576"
    lengths, widths = ([int(one) for one in text.split(",")] for text in (args.lengths, args.widths))
    from soup.model import source
    from soup.specs import ModelSpec

    tokenizer = source.folder(
        ModelSpec(
            base="smollm2",
            embedded=True,
            dtype="auto",
            quantization="none",
            quantization_aware=False,
            quantization_group_size=32,
        )
    )
    points = [(widths[len(widths) // 2], length) for length in lengths]
    points += [(width, lengths[min(1, len(lengths) - 1)]) for width in widths]
    found = []
    print(
        f"{'width':>6}{'tokens':>8}" + "".join(f"{k:>14} tok/s{'GiB':>8}" for k in ("auto", "stock")),
        flush=True,
    )
    with TemporaryDirectory() as folder:
        for width, length in dict.fromkeys(points):
            model = Path(folder) / f"llama{width}"
            if not model.exists():
                words = [sys.executable, "-c", MODEL, str(tokenizer), str(model), str(width)]
                subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
            line = f"{width:>6}{length:>8}"
            for kernels in ("auto", "stock"):
                one = measure(model, kernels, length, Path(folder))
                found.append({"width": width, "length": length, "kernels": kernels, **one})
                rate, memory = one.get("tokens_per_s"), one.get("peak_memory_bytes")
                line += f"{one['error'][:28]:>28}" if rate is None else f"{rate:>20.0f}{memory / 2**30:>8.2f}"
            print(line, flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
