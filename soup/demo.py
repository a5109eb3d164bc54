"""`make demo`: runs the quickstart, then shows three held-out prompts answered before and after it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from soup.cli.process import child
from soup.inputs import EMBEDDED
from soup.record import Run, find, read_json, write_json

PROMPTS, TOKENS = 3, 56


def main() -> int:
    """Trains unless it is done, answers unless it is answered, and says what to try next."""
    from rich.console import Console

    from soup.cli.main import main as soup

    status = soup(["experiment=quickstart", *sys.argv[1:]])
    if status != 0:
        return status
    run = next(
        run for run in reversed(find(_root(sys.argv[1:]), [])) if run.tree()["run"]["name"] == "quickstart"
    )
    samples = run.folder / "samples.json"
    if not samples.exists() and (status := child(["-m", "soup.demo", "--answer", str(run.folder)])) != 0:
        return status
    console = Console(highlight=False)
    for sample in read_json(samples):
        console.print(f"\n{sample['prompt']}", style="bold", markup=False)
        console.print(f"  before  {sample['before']}", style="dim", markup=False)
        console.print(f"  after   {sample['after']}", style="green", markup=False)
    console.print(f"\nThe run lies in {run.folder}. Three commands to try next:")
    for command in (
        f"python -m soup runs show {run.id}",
        "python -m soup data data.train=YOUR_ROWS.jsonl",
        "python -m soup plan lora.r=64 training.batch_size=16",
    ):
        console.print(f"  .venv/bin/{command}", style="cyan", markup=False)
    return 0


def answer(run: Run) -> None:
    """Greedy answers to held-out prompts with the adapter off and on, kept in the run's samples.json."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(run.model, padding_side="left")
    model = AutoPeftModelForCausalLM.from_pretrained(run.model, dtype=torch.float32).eval()
    lines = (EMBEDDED / "keeper_eval.jsonl").read_text().splitlines()[:PROMPTS]
    prompts = [json.loads(line)["messages"][0]["content"] for line in lines]
    batch = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )

    def generate() -> list[str]:
        out = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False)
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    with torch.no_grad():
        after = generate()
        with model.disable_adapter():
            before = generate()
    rows = zip(prompts, before, after, strict=True)
    write_json(run.folder / "samples.json", [{"prompt": p, "before": b, "after": a} for p, b, a in rows])


def _root(words: list[str]) -> Path:
    return Path(next((word.partition("=")[2] for word in words if word.startswith("run.root=")), "outputs"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--answer"]:
        answer(Run(Path(sys.argv[2])))
    else:
        sys.exit(main())
