"""Predicted against measured peak memory of the training process, for settings that differ in what takes memory.

    .venv/bin/python bench/plan_accuracy.py [--steps N] [--only WORD]

Each setting is `soup plan`ned and trained for a few steps in a process of its own, on rows that all have
data.max_length tokens; the demo, GRPO and the tasks of answers have soup's own rows. The measured peak is the run's
`peak_memory_bytes`: on a CPU what Linux counts as VmHWM. Status 1 where a prediction is more than LIMIT off.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

LIMIT = 0.15
CHECKOUT = Path(__file__).resolve().parents[1]
SENTENCE = "The lamp is lit, the log is written, and the sea goes on with its own business. "


def rows(batch: int, tokens: int) -> list[str]:
    return ["task=pretrain", f"training.batch_size={batch}", f"data.max_length={tokens}"]


def answers(task: str, *words: str) -> list[str]:
    return [f"task={task}", "training.batch_size=4", *words]


AWARE = ["model.quantization=4bit", "model.quantization_aware=true"]
SETTINGS = {
    "the demo": ["experiment=quickstart"],
    "1 x 128": rows(1, 128),
    "8 x 128": rows(8, 128),
    "2 x 512": rows(2, 512),
    "8 x 128, checkpointing": [*rows(8, 128), "training.gradient_checkpointing=true"],
    "4 x 512, checkpointing": [*rows(4, 512), "training.gradient_checkpointing=true"],
    "4 x 128, 4-bit": [*rows(4, 128), "model.quantization=4bit"],
    "4 x 128, simulated 4 bits": [*rows(4, 128), *AWARE],
    "2 x 64, simulated 4 bits, all weights": [*rows(2, 64), *AWARE, "lora=none"],
    "4 x 128, rank 128": [*rows(4, 128), "lora.r=128"],
    "4 x 128, DoRA": [*rows(4, 128), "lora=dora"],
    "4 x 128, all weights": [*rows(4, 128), "lora=none"],
    "4 x 128, all weights, 8-bit AdamW": [*rows(4, 128), "lora=none", "optim=adamw_8bit"],
    "dpo": answers("dpo"),
    "dpo, all weights": answers("dpo", "lora=none"),
    "dpo, all weights, a table": answers("dpo", "lora=none", "task.precompute_ref=true"),
    "kto": answers("kto"),
    "orpo": answers("orpo"),
    "simpo": answers("simpo"),
    "reward": answers("reward"),
    "grpo": ["experiment=grpo"],
    "2 x 64, all weights, accumulated": [
        *rows(2, 64),
        "lora=none",
        "training.gradient_accumulation_steps=2",
    ],
}


def measure(words: list[str], steps: int, folder: Path) -> tuple[int, int]:
    """Predicted and measured peak, in bytes, of one run of `steps` optimizer steps."""
    text = folder / "rows.jsonl"
    # Numbered: rows that begin alike would be computed once.
    numbered = [json.dumps({"text": f"{number} {SENTENCE * 40}"}) for number in range(64)]
    text.write_text("\n".join(numbered) + "\n")
    if "task=pretrain" in words:
        words = [*words, f"data.train={text}"]
    words = [*words, f"training.max_steps={steps}", f"run.root={folder / 'runs'}"]
    done = subprocess.run(
        [sys.executable, "-m", "soup", *words], capture_output=True, text=True, cwd=CHECKOUT
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)}:\n{done.stdout}{done.stderr}")
    (result,) = (folder / "runs").glob("*/result.json")
    plan = json.loads(result.with_name("plan.json").read_text())
    return plan["peak_memory_bytes"], json.loads(result.read_text())["peak_memory_bytes"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each run")
    parser.add_argument("--only", default="", help="settings whose name contains this")
    args = parser.parse_args()
    worst = 0.0
    print(f"{'setting':38}{'predicted':>12}{'measured':>12}{'ratio':>8}")
    for name, words in SETTINGS.items():
        if args.only not in name:
            continue
        with TemporaryDirectory() as folder:
            predicted, measured = measure(words, args.steps, Path(folder))
        ratio = predicted / measured
        worst = max(worst, abs(ratio - 1))
        print(f"{name:38}{predicted / 1e6:>9.0f} MB{measured / 1e6:>9.0f} MB{ratio:>8.2f}", flush=True)
    print(f"worst: {worst:.0%} off, {LIMIT:.0%} allowed")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
