"""Predicted against measured peak memory of the training process, for settings that differ in what takes memory.

    python bench/plan_accuracy.py [--steps N] [--only WORD]

Each setting trains a few steps in a process of its own; the measured peak is the operating system's (VmHWM on a
CPU). Exits with 1 where a prediction is more than 25% off.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

BOUND = 0.25
SETTINGS = {
    "the demo": ["experiment=quickstart"],
    "batch 1, short rows": ["training.batch_size=1", "data.max_length=96"],
    "batch 8": ["training.batch_size=8"],
    "longer rows (text)": ["task=pretrain", "training.batch_size=8", "data.max_length=256"],
    "all weights": ["lora=none", "training.batch_size=4"],
    "checkpointing, batch 16": ["training.gradient_checkpointing=true", "training.batch_size=16"],
    "4-bit, batch 4": ["model.quantization=4bit", "training.batch_size=4"],
    "rank 128": ["lora.r=128", "training.batch_size=4"],
}


def measure(words: list[str], steps: int, root: str) -> tuple[int, int]:
    """Predicted and measured peak, in bytes, of one run of `steps` optimizer steps."""
    command = [sys.executable, "-m", "soup", *words, f"training.max_steps={steps}", f"run.root={root}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)}:\n{done.stdout}{done.stderr}")
    (run,) = Path(root).glob("*/result.json")
    plan = json.loads(run.with_name("plan.json").read_text())
    return plan["peak_memory_bytes"], json.loads(run.read_text())["peak_memory_bytes"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", default="", help="settings whose name contains this")
    args = parser.parse_args()
    worst = 0.0
    print(f"{'setting':26}{'predicted':>12}{'measured':>12}{'ratio':>8}")
    for name, words in SETTINGS.items():
        if args.only not in name:
            continue
        with tempfile.TemporaryDirectory() as root:
            predicted, measured = measure(words, args.steps, root)
        ratio = predicted / measured
        worst = max(worst, abs(ratio - 1))
        print(f"{name:26}{predicted / 1e6:>9.0f} MB{measured / 1e6:>9.0f} MB{ratio:>8.2f}", flush=True)
    print(f"worst: {worst:.0%} off, {BOUND:.0%} allowed")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
