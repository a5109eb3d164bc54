"""A run that was killed or stopped, wherever that was, ends equal to one that was not: bit for bit on a CPU."""

import random
import signal
import time

import pytest
import torch

EXACT = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "eval_loss")
WORDS = (
    "training.max_steps=24",
    "training.gradient_accumulation_steps=2",
    "training.save_steps=4",
    "training.eval_steps=7",
    "training.logging_steps=3",
    "optim.lr=1e-2",
)


def exact(run):
    return [{key: line[key] for key in EXACT if key in line} for line in run.lines()]


def assert_equal(one, other, weights):
    assert one.result()["status"] == other.result()["status"] == "finished"
    assert exact(one) == exact(other)
    assert [line["step"] for line in exact(one) if "loss" in line][-1] == 24
    assert (one.model / weights).read_bytes() == (other.model / weights).read_bytes()
    left, right = (torch.load(run.last_checkpoint() / "optimizer.pt") for run in (one, other))
    assert left["param_groups"] == right["param_groups"]
    for index, state in left["state"].items():
        for name, value in state.items():
            assert torch.equal(value, right["state"][index][name])


def stop_at(start, until, run, step, number):
    process = start(run)
    until(process, lambda: any(line["step"] >= step for line in run.lines()))
    process.send_signal(number)
    return process.wait(timeout=60)


def test_lora_killed_at_random_steps_while_saving_and_asked_to_stop(
    tree, place, train, start, until, tmp_path
):
    configuration = tree(*WORDS, "lora.dropout=0.1")
    whole = place(configuration, tmp_path / "whole")
    assert train(whole)[0] == 0
    broken = place(configuration, tmp_path / "broken")
    seed = time.time_ns() % 1000
    print(f"seed {seed}")
    step = random.Random(seed).randint(3, 10)
    assert stop_at(start, until, broken, step, signal.SIGKILL) == -signal.SIGKILL
    assert broken.state() == "interrupted"

    before = {path.name for path in broken.checkpoints.glob("checkpoint-*")}
    process = start(broken)
    until(process, lambda: (broken.checkpoints / ".partial").exists())
    process.kill()
    process.wait()
    after = {path.name for path in broken.checkpoints.glob("checkpoint-*")}
    for name in before | after:
        assert (broken.checkpoints / name / "soup_state.json").exists(), (
            "a checkpoint is complete or invisible"
        )

    last = max(line["step"] for line in broken.lines())
    assert stop_at(start, until, broken, min(last + 3, 18), signal.SIGINT) == 130
    assert broken.result()["status"] == broken.state() == "interrupted"
    status, shown = train(broken)
    assert status == 0 and "resuming from checkpoint-" in shown
    assert_equal(whole, broken, "adapter_model.safetensors")
    assert train(broken)[0] == 0, "a finished run is left as it is"


def test_all_weights_asked_to_end(tree, place, train, start, until, tmp_path):
    configuration = tree(*WORDS, "lora=none")
    whole = place(configuration, tmp_path / "whole")
    assert train(whole)[0] == 0
    broken = place(configuration, tmp_path / "broken")
    assert stop_at(start, until, broken, 7, signal.SIGTERM) == 130
    assert train(broken)[0] == 0
    assert_equal(whole, broken, "model.safetensors")


def test_a_failing_run_says_so_shortly(tree, place, train, tmp_path):
    run = place(tree("lora.target_modules=[nonsense]"), tmp_path)
    status, shown = train(run)
    assert status == 2 and run.state() == "failed"
    assert "lora.target_modules" in shown and "Traceback" not in shown
    assert len(shown.splitlines()) < 8


def test_the_model_folder_loads_with_plain_libraries(tree, place, train, tiny_model, tmp_path):
    from huggingface_hub import ModelCard
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from soup.model.merge import merge

    run = place(tree("optim.lr=1e-2"), tmp_path)
    assert train(run)[0] == 0
    ids = AutoTokenizer.from_pretrained(run.model)("The lamp is lit", return_tensors="pt").input_ids
    tuned = AutoPeftModelForCausalLM.from_pretrained(run.model)(ids).logits
    base = AutoModelForCausalLM.from_pretrained(tiny_model)(ids).logits
    assert not torch.allclose(tuned, base, atol=1e-3), "training changed nothing"
    merge(run.model, tmp_path / "merged")
    assert torch.allclose(
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, tuned, atol=1e-5
    )
    assert ModelCard.load(run.model / "README.md").data.library_name == "peft"


@pytest.mark.parametrize("lora", ["lora", "none"])
def test_losses_are_those_of_plain_trl(lora, tree, place, train, tiny_model, tmp_path):
    """The same job written against TRL: its own template, tokenisation, masking, collation and loop."""
    import json

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    from soup.inputs import EMBEDDED

    words = ["training.logging_steps=1", "training.max_steps=12", "optim.lr=1e-2", "backend.kernels=stock"]
    run = place(tree(*words, f"lora={lora}"), tmp_path)
    assert train(run)[0] == 0

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' + '\n' }}"
        "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    rows = [json.loads(line) for line in (EMBEDDED / "keeper.jsonl").read_text().splitlines()]
    set_seed(42)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        args=SFTConfig(
            str(tmp_path / "trl"),
            use_cpu=True,
            bf16=False,
            max_length=128,
            assistant_only_loss=True,
            per_device_train_batch_size=4,
            max_steps=12,
            learning_rate=1e-2,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            gradient_checkpointing=False,
            logging_steps=1,
            seed=42,
            data_seed=42,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=None
        if lora == "none"
        else LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = [line["loss"] for line in run.lines() if "loss" in line]
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] < found[0]
