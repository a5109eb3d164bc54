"""soup's run against the same job written directly with TRL: its own tokenisation, masks, collation and loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from soup.inputs import EMBEDDED

JOB = (
    "model.dtype=float32",  # as TRL has it where nothing is said; auto is bfloat16 on some machines
    "training.max_steps=null",
    "training.epochs=2.2",
    "training.batch_size=3",
    "training.gradient_accumulation_steps=2",
    "training.logging_steps=1",
    "training.eval_steps=5",
    "training.max_grad_norm=0.5",
    "training.seed=11",
    "training.data_seed=5",
    "optim.lr=5e-3",
    "optim.weight_decay=0.01",
    "optim.warmup_ratio=0.2",
    "data.max_length=100",
    "backend.kernels=stock",
)
CHOICES = {
    "adapters": ("lora.dropout=0.1", "lora.r=8", "lora.alpha=12"),
    "all weights": ("lora=none", "optim.scheduler=linear"),
}
# What a TRL user writes. Nothing of soup is imported.
DIRECT = """
import json, sys
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

model_folder, train, held_out, output = sys.argv[1:]
template = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' + '\\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
found = {}
for name, scheduler, peft in (
    ("adapters", "cosine", LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=12, lora_dropout=0.1, target_modules="all-linear"
    )),
    ("all weights", "linear", None),
):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = template
    rows = load_dataset("json", data_files={"train": train, "eval": held_out})
    set_seed(11)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=SFTConfig(
            output_dir=f"{output}/{name}", num_train_epochs=2.2, per_device_train_batch_size=3,
            per_device_eval_batch_size=3, gradient_accumulation_steps=2, logging_steps=1, eval_strategy="steps",
            eval_steps=5, max_grad_norm=0.5, seed=11, data_seed=5, learning_rate=5e-3, weight_decay=0.01,
            warmup_steps=0.2, lr_scheduler_type=scheduler, max_length=100, assistant_only_loss=True,
            bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none", save_strategy="no",
        ),
        train_dataset=rows["train"], eval_dataset=rows["eval"], processing_class=tokenizer, peft_config=peft,
    )
    trainer.train()
    found[name] = trainer.state.log_history
print("RESULT" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Training and held-out rows, some of more than 100 tokens, which are truncated."""
    folder = tmp_path_factory.mktemp("rows")
    lines = (EMBEDDED / "keeper.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines[:40]) + "\n")
    (folder / "eval.jsonl").write_text("\n".join(lines[40:47]) + "\n")
    return folder / "train.jsonl", folder / "eval.jsonl"


@pytest.fixture(scope="module")
def direct(files, tiny_model, tmp_path_factory):
    """What TRL logged, by choice."""
    done = subprocess.run(
        [sys.executable, "-c", DIRECT, tiny_model, *files, tmp_path_factory.mktemp("direct")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("RESULT")[2])


@pytest.mark.parametrize("name", CHOICES)
def test_the_losses_are_those_of_plain_trl(direct, files, tree, place, server, name):
    train, held_out = files
    run = place(tree(*JOB, *CHOICES[name], f"data.train={train}", f"data.eval={held_out}"))
    process = server(run)
    assert process.wait() == 0, process.stdout.read()
    how = json.loads(run.effective.read_text())["data.max_length"]["how"]
    assert "; 0 rows were truncated" not in how

    theirs = [line for line in direct[name] if "loss" in line]
    ours = [line for line in run.lines() if "loss" in line]
    assert len(ours) == len(theirs) >= 15
    for key, their_key in (("loss", "loss"), ("lr", "learning_rate"), ("grad_norm", "grad_norm")):
        assert [line[key] for line in ours] == pytest.approx([line[their_key] for line in theirs], rel=1e-5)
    assert [line["epoch"] for line in ours] == pytest.approx([line["epoch"] for line in theirs])

    evaluated = {line["step"]: line["eval_loss"] for line in direct[name] if "eval_loss" in line}
    held = {line["step"]: line["eval_loss"] for line in run.lines() if "eval_loss" in line}
    assert set(evaluated) == {5, 10, 15, len(ours)}
    assert held == pytest.approx(evaluated, rel=1e-5)
