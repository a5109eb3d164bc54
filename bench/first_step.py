"""From the command to the first optimizer step: soup, a plain TRL script, and TRL's own command line.

    .venv/bin/python bench/first_step.py [ROUNDS]

SmolLM2-135M with adapters of rank 16, one short row a step, the same rows for all, soup's cache of tokenised rows warm.
Prints the median wall time in seconds until each says that its first step is done, rounds alternating.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

CHECKOUT = Path(__file__).resolve().parents[1]
SCRIPT = """
import sys
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
model, rows, out = sys.argv[1:]
SFTTrainer(
    model=model,
    args=SFTConfig(output_dir=out, max_steps=2, per_device_train_batch_size=1, logging_steps=1, use_cpu=True, bf16=True,
                   model_init_kwargs={"dtype": "bfloat16"}, report_to="none", save_strategy="no", disable_tqdm=True),
    train_dataset=load_dataset("json", data_files=rows, split="train"), peft_config=LoraConfig(r=16, lora_alpha=32),
).train()
"""


def first_step(command: list[str], mark: str, folder: str) -> float:
    """Seconds until the program prints a line with `mark`; it is stopped then."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    told = []
    for line in process.stdout:
        told.append(line)
        if mark in line:
            taken = time.perf_counter() - begin
            process.terminate()
            process.communicate()
            return taken
    sys.exit(f"{' '.join(command)}: no step\n{''.join(told[-20:])}")


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    from soup.model import source
    from soup.specs import ModelSpec

    given = {
        "dtype": "auto",
        "quantization": "none",
        "quantization_aware": False,
        "quantization_group_size": 32,
    }
    model = str(source.folder(ModelSpec(base="smollm2", embedded=True, **given)))
    seconds: dict[str, list[float]] = {}
    with TemporaryDirectory() as folder:
        rows = f"{folder}/rows.jsonl"
        chat = [{"role": "user", "content": "Is the lamp lit?"}, {"role": "assistant", "content": "It is."}]
        Path(rows).write_text((json.dumps({"messages": chat}) + "\n") * 64)
        trl = [str(Path(sys.executable).with_name("trl")), "sft", "--model_name_or_path", model]
        trl += ["--dataset_name", "json", "--output_dir", f"{folder}/cli", "--max_steps", "2", "--use_peft"]
        trl += [
            "--per_device_train_batch_size",
            "1",
            "--logging_steps",
            "1",
            "--use_cpu",
            "--dtype",
            "bfloat16",
        ]
        trl += ["--lora_r", "16", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true"]
        local = Path(folder) / "json"  # what `--dataset_name json` finds here
        local.mkdir()
        (local / "train.jsonl").write_text(Path(rows).read_text())
        soup = [
            sys.executable,
            "-m",
            "soup",
            f"data.train={rows}",
            "data.eval_fraction=0",
            "training.batch_size=1",
        ]
        soup += [
            "training.max_steps=2",
            "training.logging_steps=1",
            "run.resume=never",
            f"run.root={folder}/runs",
        ]
        sides = {
            "soup": (soup, "step 1/2"),
            "TRL, a script": ([sys.executable, "-c", SCRIPT, model, rows, f"{folder}/out"], "'loss'"),
            "TRL's command": (trl, "'loss'"),
        }
        first_step(*sides["soup"], folder)  # tokenises
        for _ in range(rounds):
            for name, side in sides.items():
                seconds.setdefault(name, []).append(first_step(*side, folder))
    for name, taken in seconds.items():
        print(f"{name:16}{median(taken):7.2f} s to the first step   ({min(taken):.2f} to {max(taken):.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
