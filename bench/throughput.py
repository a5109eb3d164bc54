"""soup, plain TRL and Unsloth side by side: tokens that are not padding, per second, and peak memory.

    .venv/bin/python bench/throughput.py [--quick] [--json FILE] [--model FOLDER] [--data FILE] [--sides soup,trl] ...
    .venv/bin/python bench/throughput.py --task dpo --batch 4 [--data FILE] ...

Each side trains the same model on the same token rows in the same order, in a process of its own, with the same
precision rule (bfloat16 weights and products with adapters, float32 weights where all train; float32 where the CPU has
no bfloat16), the same batch, and the optimizer AdamW at one rate. Rounds alternate. The first step of each run warms up
and is not counted. TRL and Unsloth are plain scripts at their libraries' defaults for this job, rows padded, and
import nothing of soup; they read the rows that soup tokenised. soup is `python -m soup` as a user types it. Of DPO's
sides there are two: Unsloth trains SFT only on a CPU.

Printed: medians over rounds and their range, the loss of the last step, each side's ratio to soup, and MFU: the
model's own arithmetic (`flops`) for all tokens over what this machine does in large bfloat16 products. `alike` is the
share of tokens that rows of a step begin with alike, on average, at least: soup computes those once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
SIDES = {"sft": ("soup", "trl", "unsloth"), "dpo": ("soup", "trl")}
EMBEDDED = {"sft": "soup/embedded/keeper.jsonl", "dpo": "soup/embedded/preference.jsonl"}
SEED, RATE = 42, 2e-4
# What a user of TRL or Unsloth writes; argv: side, a JSON of settings.
DIRECT = """
import json, os, sys, time, resource
side, job = sys.argv[1], json.loads(sys.argv[2])
bf16 = job["bf16"]
if side == "unsloth":
    os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_CPU_BF16": "1" if bf16 else "0"}
    os.environ |= {"UNSLOTH_DISABLE_AUTO_PADDING_FREE": "0", "UNSLOTH_COMPILE_LOCATION": job["folder"] + "/unsloth"}
    if job["device"] == "cpu":
        os.environ["UNSLOTH_FORCE_CPU"] = "1"
    from unsloth import FastLanguageModel
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

set_seed(job["seed"])
dtype = torch.bfloat16 if bf16 and job["r"] else torch.float32
tokenizer = AutoTokenizer.from_pretrained(job["model"])
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
peft = None
if side == "unsloth":
    model, _ = FastLanguageModel.from_pretrained(
        job["model"], max_seq_length=job["max_length"], dtype=dtype, load_in_4bit=False,
        full_finetuning=not job["r"], use_gradient_checkpointing=False, random_state=job["seed"],
    )
    if job["r"]:
        model = FastLanguageModel.get_peft_model(
            model, r=job["r"], lora_alpha=job["alpha"], lora_dropout=0.0, target_modules=targets,
            use_gradient_checkpointing=False, random_state=job["seed"],
        )
else:
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    if job["r"]:
        peft = LoraConfig(task_type="CAUSAL_LM", r=job["r"], lora_alpha=job["alpha"], target_modules="all-linear")

preference = job["task"] == "dpo"
class Timed(DPOTrainer if preference else SFTTrainer):
    steps = []
    def _prepare_dataset(self, dataset, *args, **kwargs):  # which soup has tokenised
        return dataset
    def training_step(self, model, inputs, *args, **kwargs):
        mask = inputs.get("attention_mask")
        tokens = int(mask.sum() if mask is not None else inputs["input_ids"].numel())
        begin, busy = time.perf_counter(), time.process_time()
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.steps.append({"begin": begin, "busy": busy, "tokens": tokens, "loss": float(loss)})
        return loss

class Ends(TrainerCallback):
    def on_step_end(self, *_, **__):
        Timed.steps[-1] |= {"end": time.perf_counter(), "idle": time.process_time()}

extra = {} if preference else {"dataset_kwargs": {"skip_prepare_dataset": True}}
if side == "unsloth":
    extra["loss_type"] = "nll"  # TRL's default takes Unsloth's forward away from it
trainer = Timed(
    model=model,
    args=(DPOConfig if preference else SFTConfig)(
        output_dir=job["folder"] + "/out", max_steps=job["steps"], per_device_train_batch_size=job["batch"],
        learning_rate=job["rate"], seed=job["seed"], data_seed=job["seed"], bf16=bf16, use_cpu=job["device"] == "cpu",
        max_length=job["max_length"], gradient_checkpointing=False,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, weight_decay=0.0,
        lr_scheduler_type="cosine", dataloader_pin_memory=False, **extra,
    ),
    train_dataset=Dataset.from_file(job["rows"]), processing_class=tokenizer, peft_config=peft, callbacks=[Ends()],
)
trainer.train()
kept = Timed.steps[1:]
peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() and job["device"] != "cpu" else 0
print("RESULT" + json.dumps({
    "tokens": sum(s["tokens"] for s in kept), "seconds": sum(s["end"] - s["begin"] for s in kept),
    "peak_memory_bytes": peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "losses": [s["loss"] for s in Timed.steps], "processor_seconds": sum(s["idle"] - s["busy"] for s in kept),
}))
"""


def soup_words(args: argparse.Namespace, root: str) -> list[str]:
    return [
        f"task={args.task}",
        *(["model=smollm2"] if args.model is None else ["model=hub", f"model.base={args.model}"]),
        f"data.train={args.data}",
        "data.eval_fraction=0",
        f"data.max_length={args.max_length}",
        *(["lora=none"] if args.all_weights else [f"lora.r={args.r}", f"lora.alpha={args.alpha}"]),
        f"training.batch_size={args.batch}",
        f"training.max_steps={args.steps}",
        "training.logging_steps=1",
        "training.save_steps=100000",
        f"training.seed={SEED}",
        f"optim.lr={RATE}",
        "optim.weight_decay=0.0",
        "optim.warmup_ratio=0.0",
        f"launch.device={args.device}",
        *(["model.dtype=float32"] if args.float32 else []),
        f"run.root={root}",
        *args.words,
    ]


def soup(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    root = Path(folder) / f"runs{time.monotonic_ns()}"
    words = soup_words(args, str(root))
    done = subprocess.run(
        [sys.executable, "-m", "soup", *words], cwd=CHECKOUT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    (metrics,) = root.glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    steps = [
        (after["tokens"] - before["tokens"], after["tokens_per_s"])
        for before, after in zip(lines, lines[1:], strict=False)
    ]
    return {
        "tokens": sum(tokens for tokens, _ in steps),
        "seconds": sum(tokens / rate for tokens, rate in steps),
        "peak_memory_bytes": lines[-1]["peak_memory_bytes"],
        "losses": [line["loss"] for line in lines],
    }


def direct(side: str, job: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", DIRECT, side, json.dumps(job)],
        cwd=job["folder"],
        capture_output=True,
        text=True,
    )
    if done.returncode or "RESULT" not in done.stdout:
        sys.exit(f"{side}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(done.stdout.rpartition("RESULT")[2].splitlines()[0])


def matrix_rate(bf16: bool) -> float:
    """Operations per second of large matrix products, the best of ten, in a process of its own."""
    code = f"""
import time, torch
device = "cuda" if torch.cuda.is_available() else "cpu"
a, b = (torch.randn(2048, 2048, device=device, dtype=torch.{"bfloat16" if bf16 else "float32"}) for _ in "ab")
def once():
    begin = time.perf_counter()
    for _ in range(5):
        a @ b
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin
once()
print(5 * 2 * 2048**3 / min(once() for _ in range(10)))
"""
    return float(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


def flops(
    model: dict[str, Any], all_weights: bool, r: int, learnt_share: float, length: float, reference: bool
) -> float:
    """Operations a token that the model's mathematics needs: forward, gradients of activations, and of what trains;
    and the reference's forward pass, which has no adapters."""
    from soup.plan.decoder import shape

    decoder = shape(model)
    passes = 6 if all_weights else 4  # two operations a weight in each of three passes, or of two
    passes += 2 * reference
    layers = decoder.linear * passes
    head = decoder.vocab * decoder.hidden * passes * learnt_share
    thin = 0 if all_weights else decoder.layers * sum(6 * r * (i + o) for _, i, o, _ in decoder.linears)
    attention = (
        decoder.layers * decoder.heads * 2 * length / 2 * 2 * (3 + reference)
    )  # causal; backward is twice forward
    return layers + head + thin + attention


def rows_of(args: argparse.Namespace) -> tuple[Path, Path, dict[str, Any]]:
    """The rows that soup tokenised, the model's folder, and the rows' report."""
    from soup.cli.compose import drive
    from soup.cli.main import parse
    from soup.data.prepare import prepare
    from soup.inputs import data_arguments
    from soup.model import source
    from soup.schema import check

    config = check(drive(parse(soup_words(args, "unused")), lambda points: points[0].tree))
    folder = source.folder(config.model)
    prepared = prepare(**data_arguments(config, folder))["train"]
    return prepared.open(), folder, prepared.report.to_dict()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model folder; SmolLM2-135M if not given")
    parser.add_argument("--task", choices=SIDES, default="sft")
    parser.add_argument("--data", help="a file of rows; the task's embedded ones if not given")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="rows in a step")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--all-weights", action="store_true")
    parser.add_argument("--float32", action="store_true", help="all sides in float32: losses differ by less")
    parser.add_argument("--sides", default="soup,trl,unsloth")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="one round of four steps")
    parser.add_argument("--json", help="a file for the numbers")
    parser.add_argument("words", nargs="*", help="more settings for soup's side")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.rounds = 4, 1
    args.data = str(Path(args.data or CHECKOUT / EMBEDDED[args.task]).resolve())
    sides = [side for side in SIDES[args.task] if side in args.sides.split(",")]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    from soup.device import resolve
    from soup.plan.unpadded import alike

    rows, model, report = rows_of(args)
    bf16 = resolve(args.device).bf16 and not args.float32
    print(f"{model.name}, {Path(args.data).name}: {report['rows']} rows, batch {args.batch}", flush=True)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with TemporaryDirectory() as folder:
        job = {
            "task": args.task,
            "model": str(model),
            "rows": str(rows),
            "folder": folder,
            "bf16": bf16,
            "r": 0 if args.all_weights else args.r,
            "alpha": args.alpha,
            "steps": args.steps,
            "batch": args.batch,
            "seed": SEED,
            "rate": RATE,
            "max_length": args.max_length,
            "device": args.device,
        }
        for number in range(args.rounds):
            for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
                one = soup(args, folder) if side == "soup" else direct(side, job)
                found[side].append(one)
                rate = one["tokens"] / one["seconds"]
                print(
                    f"round {number + 1} {side:8}{rate:8.1f} tokens/s"
                    f"{one['peak_memory_bytes'] / 2**30:7.2f} GiB   loss {one['losses'][-1]:.4f}",
                    flush=True,
                )
    peak_rate = matrix_rate(bf16)
    result = summary(found)
    lengths = report["lengths"]
    learnt = lengths["sum_labels"] / lengths["sum"]
    described = json.loads((model / "config.json").read_text())
    needed = flops(described, args.all_weights, args.r, learnt, lengths["mean"], args.task == "dpo")
    result["matrix_flops_per_s"], result["flops_per_token"] = peak_rate, needed
    for side in sides:
        result["mfu_of"] = result.get("mfu_of", {}) | {
            side: result["tokens_per_s"][side] * needed / peak_rate
        }
    result["mfu"] = result["mfu_of"].get("soup")
    sides_of_a_row = 2 if args.task == "dpo" else 1
    once = alike(args.batch, lengths["common"], lengths["shared"])
    result["alike"] = once / (args.batch * sides_of_a_row * lengths["mean"])
    print(json.dumps(result, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    return 0


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    rates = {side: [one["tokens"] / one["seconds"] for one in all_] for side, all_ in found.items()}
    result: dict[str, Any] = {
        "tokens_per_s": {side: median(all_) for side, all_ in rates.items()},
        "tokens_per_s_range": {side: [min(all_), max(all_)] for side, all_ in rates.items()},
        "peak_memory_bytes": {s: max(o["peak_memory_bytes"] for o in all_) for s, all_ in found.items()},
        "losses": {side: all_[-1]["losses"] for side, all_ in found.items()},
    }
    for side in ("unsloth", "trl"):
        if side in rates and "soup" in rates:
            ratios = [ours / theirs for ours, theirs in zip(rates["soup"], rates[side], strict=True)]
            result[f"ratio_{side}"] = median(ratios)
            result[f"ratio_{side}_range"] = [min(ratios), max(ratios)]
            memory = result["peak_memory_bytes"]
            result[f"memory_share_{side}"] = memory["soup"] / memory[side]
    return result


if __name__ == "__main__":
    sys.exit(main())
