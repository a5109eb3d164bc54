"""How long a user waits: for the answers of `soup --cfg job` and `soup plan`, and from the command to the first step.

    .venv/bin/python bench/startup.py [--answers ROUNDS] [--steps ROUNDS]

Answers are compared with a minimal Hydra application's `--cfg job`, and must stay within LIMIT times it, else the
status is 1. First steps are compared with a plain TRL script's and TRL's own command's: SmolLM2-135M, adapters of rank
16, one short row a step, the same rows for all, soup's cache of tokenised rows warm; time until each says that its
first step is done. Medians of wall time in seconds; rounds alternate, so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

LIMIT = 3.0
CHECKOUT = Path(__file__).resolve().parents[1]
SOUP = [sys.executable, "-m", "soup"]
MINIMAL = """\
import hydra


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(cfg):
    pass


main()
"""
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
TRL_WORDS = (
    "--max_steps 2 --use_peft --lora_r 16 --per_device_train_batch_size 1 --logging_steps 1 --use_cpu --dtype bfloat16 "
    "--report_to none --save_strategy no --disable_tqdm true"
)
SOUP_WORDS = "data.eval_fraction=0 training.batch_size=1 training.max_steps=2 training.logging_steps=1 run.resume=never"


def answer(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, cwd=CHECKOUT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


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


def medians(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Of each side; one more round at the beginning fills caches and does not count."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, once in sides.items():
            taken[name].append(once())
    return {name: median(each[1:]) for name, each in taken.items()}


def answers(folder: str, rounds: int) -> dict[str, float]:
    app = Path(folder) / "app.py"
    app.write_text(MINIMAL)
    (app.parent / "conf").mkdir()
    (app.parent / "conf" / "config.yaml").write_text("lr: 1.0e-4\n")
    return medians(
        {
            "minimal --cfg job": lambda: answer([sys.executable, str(app), "--cfg", "job"]),
            "soup --cfg job": lambda: answer([*SOUP, "--cfg", "job"]),
            "soup plan": lambda: answer([*SOUP, "plan"]),
        },
        rounds,
    )


def first_steps(folder: str, rounds: int) -> dict[str, float]:
    from soup.cli.compose import drive
    from soup.cli.main import parse
    from soup.model import source
    from soup.schema import check

    rows = Path(folder) / "rows" / "train.jsonl"
    rows.parent.mkdir()
    chat = [{"role": "user", "content": "Is the lamp lit?"}, {"role": "assistant", "content": "It is."}]
    rows.write_text((json.dumps({"messages": chat}) + "\n") * 64)
    soup = [*SOUP, f"data.train={rows}", f"run.root={folder}/runs", *SOUP_WORDS.split()]
    config = check(drive(parse(soup[3:]), lambda points: points[0].tree))
    model = str(source.folder(config.model))
    script = [sys.executable, "-c", SCRIPT, model, str(rows), f"{folder}/out"]
    trl = [str(Path(sys.executable).with_name("trl")), "sft", "--model_name_or_path", model]
    trl += ["--dataset_name", str(rows.parent), "--output_dir", f"{folder}/cli", *TRL_WORDS.split()]
    return medians(
        {
            "soup": lambda: first_step(soup, "step 1/2", folder),
            "TRL, a script": lambda: first_step(script, "'loss'", folder),
            "TRL's command": lambda: first_step(trl, "'loss'", folder),
        },
        rounds,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=int, default=9, help="rounds")
    parser.add_argument("--steps", type=int, default=3, help="rounds")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        answered = answers(folder, args.answers)
        minimal = answered["minimal --cfg job"]
        for name, taken in answered.items():
            print(f"{name:18} {taken:6.3f} s   {taken / minimal:4.2f} x minimal", flush=True)
        for name, taken in first_steps(folder, args.steps).items() if args.steps else ():
            print(f"{name:18} {taken:6.2f} s to the first step")
    return int(max(answered.values()) > LIMIT * minimal)


if __name__ == "__main__":
    sys.exit(main())
