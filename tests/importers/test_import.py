"""Configurations as the four tools write them become experiments that compose, and no key is lost on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from soup import schema
from soup.cli.compose import drive
from soup.cli.main import main, parse
from soup.importers.files import TOOLS, read
from soup.importers.mapping import _flat, translate
from soup.importers.trl import TASK

DATA = Path(__file__).parent / "data"
FILES = sorted(DATA.glob("*/*.y*ml"))
EXPECTED = {
    "soup-cli/every_key.yaml": {
        "model.base": "./model",
        "model.quantization": "8bit",
        "model.quantization_aware": True,
        "run.root": "./my-output",
        "data.train": "./rows.jsonl",
        "data.format": "alpaca",
        "data.max_length": 4096,
        "training.epochs": 2.0,
        "training.batch_size": 2,
        "optim.lr": 3e-5,
        "lora.r": 32,
        "lora.alpha": 64.0,
        "lora.target_modules": ["q_proj", "v_proj"],
        "lora.use_dora": True,
        "lora.use_rslora": True,
        "lora.loraplus_lr_ratio": 8.0,
        "training.neftune_alpha": 5.0,
        "training.use_liger": True,
        "training.use_flash_attn": "auto",
        "training.gradient_checkpointing": True,
        "longctx.rope_scaling_type": "yarn",
        "longctx.use_ring_attention": True,
        "training.moe_lora": True,
        "training.moe_aux_loss_coeff": 0.02,
        "training.curriculum": True,
        "training.curriculum_metric": "loss",
        "training.curriculum_buckets": 6,
        "training.freeze_layers": 3,
        "training.freeze_ratio": 0.25,
        "training.loss_watchdog": True,
        "training.loss_watchdog_threshold": 2.5,
        "training.loss_watchdog_patience": 7,
        "training.packing": True,
        "optim.weight_decay": 0.01,  # soup-cli's default
        "training.gradient_accumulation_steps": 4,
    },
    "soup-cli/galore.yaml": {
        "optim.name": "galore",
        "optim.galore_rank": 64,
        "optim.galore_update_proj_gap": 50,
        "optim.galore_scale": 0.5,
        "lora.name": "none",
        "model.quantization": "none",
        "data.format": "messages",
        "training.curriculum_buckets": 4,
    },
    "soup-cli/rlhf.yaml": {
        "task.name": "ppo",
        "task.reward_model": "./reward",
        "task.num_ppo_epochs": 4,
        "task.cliprange": 0.2,
        "task.kl_coef": 0.05,
        "data.eval_fraction": 0.0,
        "lora.dropout": 0.0,
    },
    "llamafactory/lora_sft.yaml": {
        "model.base": "Qwen/Qwen2.5-7B-Instruct",
        "model.trust_remote_code": True,
        "data.train": ["data/identity", "data/alpaca_en_demo"],
        "data.max_length": 1024,
        "data.max_samples": 500,
        "data.eval_fraction": 0.1,
        "lora.r": 16,
        "lora.alpha": 32.0,  # twice the rank, its default
        "lora.target_modules": "all-linear",
        "optim.lr": 1e-4,
        "optim.warmup_ratio": 0.1,
        "training.batch_size": 2,
        "training.eval_steps": 250,
        "training.gradient_checkpointing": True,
    },
    "llamafactory/qlora_simpo_ds2.yaml": {
        "task.name": "simpo",
        "task.beta": 2.0,
        "task.gamma": 1.2,
        "model.quantization": "4bit",
        "lora.target_modules": ["q_proj", "v_proj"],
        "distributed.name": "zero2",
        "optim.lr": 5e-6,
        "optim.warmup_ratio": 0.1,
        "training.use_flash_attn": "v2",
    },
    "llamafactory/full_galore.yaml": {
        "optim.name": "galore",
        "optim.galore_rank": 64,
        "optim.galore_scale": 2.0,
        "optim.galore_update_proj_gap": 200,
        "lora.name": "none",
        "model.dtype": "bfloat16",
    },
    "axolotl/qlora.yml": {
        "model.quantization": "4bit",
        "data.train": "teknium/GPT4-LLM-Cleaned",
        "data.format": "alpaca",
        "data.eval_fraction": 0.1,
        "data.max_length": 1024,
        "training.packing": True,
        "lora.r": 32,
        "lora.target_modules": ["gate_proj", "q_proj"],
        "optim.name": "adamw_8bit",
        "training.use_flash_attn": "v2",
        "training.loss_watchdog": True,
        "training.loss_watchdog_threshold": 5.0,
        "training.loss_watchdog_patience": 3,
        "tracking.wandb.project": "mine",
    },
    "axolotl/dpo_lora.yml": {
        "task.name": "dpo",
        "task.beta": 0.2,
        "model.quantization": "8bit",
        "lora.target_modules": "all-linear",
        "training.epochs": 4.0,
    },
    "axolotl/full_liger_fsdp.yaml": {
        "lora.name": "none",
        "distributed.name": "fsdp_full_offload",
        "training.use_liger": True,
        "optim.name": "paged_adamw_8bit",
        "optim.warmup_ratio": 0.1,  # 100 of 1000 steps
    },
    "trl/sft_qlora.yaml": {
        "task.name": "sft",
        "data.train": "HuggingFaceH4/ultrachat_200k",
        "model.revision": "main",
        "model.dtype": "bfloat16",
        "model.quantization": "4bit",
        "lora.target_modules": ["q_proj", "down_proj"],
        "tracking.tensorboard.name": "tensorboard",
        "tracking.wandb.name": "wandb",
        "training.max_steps": None,
    },
    "trl/dpo_qlora.yaml": {
        "task.name": "dpo",
        "task.beta": 0.01,
        "training.seed": 7,
        "data.max_length": 1024,
    },
    "trl/sft_minimal.yaml": {"lora.name": "none", "optim.lr": 1e-4, "data.train": "stanfordnlp/imdb"},
}


def name_of(path: Path) -> str:
    return str(path.relative_to(DATA))


def flags_of(path: Path) -> list[str]:
    return ["--task", path.name.partition("_")[0]] if path.parent.name == "trl" else []


def at(tree, key):
    for part in key.split("."):
        tree = tree[part]
    return tree


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_becomes_an_experiment_that_composes(path, capsys):
    assert main(["import", str(path), *flags_of(path)]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    (written,) = Path("conf/experiment").glob("*.yaml")
    args = parse(["--config-dir", "conf", f"+experiment={written.stem}"])
    tree = drive(args, lambda points: points[0].tree)
    schema.check(tree)
    expected = EXPECTED[name_of(path)]
    assert {key: at(tree, key) for key in expected} == expected
    assert f"soup plan --config-dir conf +experiment={written.stem}" in shown
    assert main(["import", str(path), *flags_of(path)]) == 0, "once more is the same file"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_key_is_mapped_or_has_its_reason(path, capsys):
    assert main(["import", str(path), "--json", *flags_of(path)]) == 0
    told = json.loads(capsys.readouterr().out)
    tool = TOOLS[path.parent.name]
    file = read(path)
    mapped = {key for sources in told["from"].values() for key in sources.split(", ")}
    for key, _ in _flat(file, tool.table):
        assert key in mapped or key in told["same"] or key in told["without_counterpart"], key
    assert all(told["without_counterpart"].values()) and all(told["same"].values())


def test_soup_clis_documented_keys_are_all_in_the_table():
    documented = """base task backend output data.train data.format data.max_length training.epochs training.lr
    training.quantization training.quantization_aware training.lora.r training.lora.alpha training.lora.use_dora
    training.lora.use_rslora training.loraplus_lr_ratio training.use_galore training.galore_rank
    training.galore_update_proj_gap training.galore_scale training.neftune_alpha training.use_liger
    training.use_flash_attn training.gradient_checkpointing training.rope_scaling_type training.use_ring_attention
    training.moe_lora training.moe_aux_loss_coeff training.curriculum training.curriculum_metric
    training.curriculum_buckets training.freeze_layers training.freeze_ratio training.loss_watchdog
    training.loss_watchdog_threshold training.loss_watchdog_patience training.packing"""
    assert set(documented.split()) <= set(TOOLS["soup-cli"].table)


@pytest.mark.parametrize(
    ("flags", "choice"),
    [
        (["--deepspeed", "zero2"], "zero2"),
        (["--deepspeed", "zero3"], "zero3"),
        (["--deepspeed", "zero2_offload"], "zero2_offload"),
        (["--fsdp", "full_shard"], "fsdp_full_shard"),
        (["--fsdp", "shard_grad"], "fsdp_shard_grad"),
        (["--fsdp", "full_offload"], "fsdp_full_offload"),
    ],
)
def test_flags_that_shard(flags, choice, capsys):
    assert main(["import", str(DATA / "soup-cli/galore.yaml"), *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["choices"]["distributed"] == choice


def test_names_in_dataset_info(capsys):
    """LLaMA-Factory's own index of data sets, where it is there."""
    Path("data").mkdir()
    entries = {"identity": {"file_name": "identity.json"}, "alpaca_en_demo": {"hf_hub_url": "some/alpaca"}}
    Path("data/dataset_info.json").write_text(json.dumps(entries))
    assert main(["import", str(DATA / "llamafactory/lora_sft.yaml"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["keys"]["data.train"] == ["data/identity.json", "some/alpaca"]
    assert "dataset" not in told["without_counterpart"]


def test_an_unknown_key_is_listed_and_a_wrong_value_too():
    file = {"base": "m", "training": {"lr": "fast", "made_up": {"a": 1}, "lora": {"r": 8, "new": 2}}}
    found = translate(TOOLS["soup-cli"], file)
    assert set(found.left) == {"training.lr", "training.made_up", "training.lora.new"}
    assert found.left["training.lr"].startswith("cannot be read: could not convert")


def test_two_keys_that_differ_are_both_seen():
    file = {"base_model": "m", "flash_attention": True, "attn_implementation": "sdpa", "learning_rate": 1}
    found = translate(TOOLS["axolotl"], file)
    assert found.put["training.use_flash_attn"] == ("off", "attn_implementation")
    assert "attn_implementation says" in found.left["flash_attention"]


def test_all_linear_layers_are_more_than_some_of_them():
    file = {
        "base_model": "m",
        "adapter": "lora",
        "lora_target_linear": True,
        "lora_target_modules": ["q_proj"],
    }
    found = translate(TOOLS["axolotl"], file)
    assert found.put["lora.target_modules"][0] == "all-linear"
    assert found.same["lora_target_modules"] and "lora_target_linear" not in found.left


def test_axolotls_quantization_aware_training():
    file = {"base_model": "m", "qat": {"activation_dtype": "int8", "weight_dtype": "int4", "group_size": 64}}
    found = translate(TOOLS["axolotl"], file)
    assert {key: value for key, (value, _) in found.put.items() if "quantization" in key} == {
        "model.quantization": "4bit",
        "model.quantization_aware": True,
        "model.quantization_group_size": 64,
    }
    assert found.left["qat"].endswith("(activation_dtype)")
    assert "4 or 8 bits" in translate(TOOLS["axolotl"], {"qat": {"weight_dtype": "nvfp4"}}).left["qat"]


def test_what_llama_factory_generates_with_is_ppos():
    file = {"model_name_or_path": "m", "stage": "ppo", "max_new_tokens": 512, "top_p": 0.9}
    found = translate(TOOLS["llamafactory"], file)
    assert found.put["task.response_length"] == (512, "max_new_tokens")
    assert found.put["task.temperature"] == (0.95, "LLaMA-Factory's default")
    assert "top_p" in found.left


def test_a_recipe_of_the_alignment_handbooks(capsys):
    Path("orpo.yaml").write_text(
        "model_name_or_path: m\nbeta: 0.05\nremove_unused_columns: true\nmade_up: 1\n"
    )
    assert (
        main(["import", "orpo.yaml", "--from", "trl", "--task", "orpo", "--json", "--out", "mine.yaml"]) == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["choices"]["task"] == "orpo" and told["keys"]["task.beta"] == 0.05
    assert told["without_counterpart"]["made_up"].startswith("is none of the keys of TRL")
    assert "remove_unused_columns" in told["same"]


def test_a_value_that_soup_refuses_is_listed(capsys):
    Path("odd.yaml").write_text(
        yaml.safe_dump({"base": "m", "training": {"lora": {"alpha": -3}, "epochs": 2}})
    )
    assert main(["import", "odd.yaml", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["without_counterpart"]["training.lora.alpha"].endswith("must be greater than 0")
    assert told["keys"]["training.epochs"] == 2.0
    assert any("no rows are named" in note for note in told["notes"])


def left_of(tool, file):
    return translate(TOOLS[tool], file).left


CHATS = {"path": "a/b", "type": "chat_template"}


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ({"field_messages": "conversations", "message_property_mappings": {"role": "from", "content": "value"}}, ""),
        ({"field_messages": "messages", "message_field_role": "role", "message_field_content": "content"}, ""),
        ({"split": "train"}, ""),
        ({"split": "train[:1%]"}, "(split)"),
        ({"field_messages": "conversation"}, "(field_messages)"),
        ({"field_messages": "conversations"}, "(field_messages)"),
        ({"message_property_mappings": {"role": "from", "content": "value"}}, "(message_property_mappings)"),
        ({"type": "alpaca"}, "without Alpaca's own words around them"),
    ],
    ids=str,
)  # fmt: skip
def test_columns_of_axolotls_sources(source, why):
    """Listed where soup would read them otherwise: not as long as they are the usual ones."""
    left = left_of("axolotl", {"base_model": "m", "datasets": [CHATS | source]})
    assert left.get("datasets", "").endswith(why) and bool(why) == ("datasets" in left)


def test_axolotl_drops_what_is_too_long_unless_it_cuts_text():
    chats = translate(TOOLS["axolotl"], {"base_model": "m", "datasets": [CHATS]})
    assert chats.put["data.on_too_long"] == ("skip", "axolotl's default")
    for file in ({"datasets": [{"path": "a", "type": "completion"}]}, {"pretraining_dataset": "a"}):
        assert "data.on_too_long" not in translate(TOOLS["axolotl"], {"base_model": "m"} | file).put
    raises = translate(TOOLS["axolotl"], {"base_model": "m", "excess_length_strategy": "raise"})
    assert raises.put["data.on_too_long"][0] == "refuse"


def test_axolotls_trackers(capsys):
    file = {
        "base_model": "m",
        "wandb_project": "p",
        "trackio_project_name": "q",
        "mlflow_experiment_name": "",
    }
    Path("a.yml").write_text(yaml.safe_dump(file | {"learning_rate": 1e-4}))
    assert main(["import", "a.yml", "--from", "axolotl", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["choices"]["tracking"] == "[wandb,trackio]"
    assert told["keys"]["tracking.wandb.project"] == "p" and told["keys"]["tracking.trackio.project"] == "q"
    off = translate(TOOLS["axolotl"], {"base_model": "m", "use_wandb": False, "wandb_project": "p"})
    assert "tracking" not in off.chosen and "wandb_project" in off.same


def test_llama_factory_packs_what_it_pretrains_on():
    file = {"model_name_or_path": "m", "stage": "pt"}
    assert translate(TOOLS["llamafactory"], file).put["training.packing"] == (True, "LLaMA-Factory's default")
    assert "training.packing" not in translate(TOOLS["llamafactory"], file | {"stage": "sft"}).put
    assert not translate(TOOLS["llamafactory"], file | {"packing": False}).put["training.packing"][0]


@pytest.mark.parametrize(
    ("more", "flags", "seconds"),
    [({}, [], None), ({}, ["--deepspeed", "zero2"], 7200), ({"fsdp": "full_shard auto_wrap"}, [], 7200)],
    ids=["one process", "a flag", "the file"],
)
def test_how_long_processes_wait(more, flags, seconds, capsys):
    file = {"model_name_or_path": "m", "stage": "sft", "ddp_timeout": 7200}
    Path("f.yaml").write_text(yaml.safe_dump(file | more))
    assert main(["import", "f.yaml", *flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["keys"].get("distributed.timeout_s") == seconds
    assert ("ddp_timeout" in told["same"]) == (seconds is None) and "ddp_timeout" not in told[
        "without_counterpart"
    ]


@pytest.mark.parametrize(
    ("value", "choice"),
    [
        ("full_shard auto_wrap", "fsdp_full_shard"),
        (["shard_grad_op"], "fsdp_shard_grad"),
        ("full_shard offload", "fsdp_full_offload"),
        ("hybrid_shard", None),
    ],
)
def test_transformers_fsdp(value, choice):
    found = translate(TOOLS["trl"], {"model_name_or_path": "m", "fsdp": value, TASK: "sft"})
    assert found.chosen.get("distributed", (None,))[0] == choice
    assert ("fsdp" in found.left) == (choice is None)


def test_when_the_alignment_handbooks_evaluate_and_save():
    def left(**keys):
        return left_of("trl", {"model_name_or_path": "m", TASK: "sft"} | keys)

    assert "eval_strategy" not in left(eval_strategy="no")
    assert left(eval_strategy="epoch")["eval_strategy"].endswith("not in this file: training.eval_steps")
    assert left(save_strategy="epoch")["save_strategy"].endswith("not in this file: training.save_steps")
    assert left(save_strategy="no")["save_strategy"].startswith("soup saves what a resume needs")


def test_an_optimizer_that_pages_is_its_own_and_the_paging_listed():
    found = translate(TOOLS["axolotl"], {"base_model": "m", "optimizer": "paged_adamw_32bit"})
    assert found.chosen["optim"][0] == "adamw" and "paged_adamw_8bit" in found.left["optimizer"]
    assert (
        "and takes adamw"
        in left_of("axolotl", {"base_model": "m", "optimizer": "adamw_torch_4bit"})["optimizer"]
    )


@pytest.mark.parametrize(
    ("tool", "file", "key"),
    [
        ("soup-cli", {"base": "m", "task": "bco"}, "task"),
        ("axolotl", {"base_model": "m", "rl": "ebft"}, "rl"),
        ("llamafactory", {"model_name_or_path": "m", "stage": "dpo", "pref_loss": "hinge"}, "stage"),
    ],
)
def test_a_task_that_soup_has_not_says_what_is_trained(tool, file, key):
    assert left_of(tool, file)[key].endswith("trains sft as this stands")


def test_a_file_that_names_no_model_says_what_would_be_taken(capsys):
    Path("v1.yaml").write_text(
        "model: m\nlearning_rate: 1.0e-4\n"
    )  # LLaMA-Factory's v1, which is another format
    assert main(["import", "v1.yaml", "--from", "llamafactory", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert any("no model is named in this file (model_name_or_path)" in note for note in notes)


REFUSED = {
    "no file": (["nowhere.yaml"], "nowhere.yaml: No such file or directory", "a YAML file"),
    "nothing": ([], "takes one file", "soup import soup.yaml"),
    "not YAML": (["bad.yaml"], "bad.yaml", "a YAML file"),
    "nobody's": (["other.yaml"], "no key that tells", "--from soup-cli"),
    "two tools'": (["both.yaml"], "keys of several tools", "--from soup-cli"),
    "TRL without a task": (["trl.yaml"], "which task it is for", "--task sft"),
    "a task beside the file's": (["cli.yaml", "--task", "sft"], "--task=sft", "drop it"),
    "both ways to shard": (
        ["cli.yaml", "--deepspeed", "zero2", "--fsdp", "full_shard"],
        "exclude",
        "one of them",
    ),
    "a name of soup's": (["dpo.yaml"], "an experiment dpo of its own", "my_dpo.yaml"),
    "no YAML to write": (["cli.yaml", "--out", "x.txt"], "is no YAML file", "x.txt.yaml"),
    "another file there": (["cli.yaml", "--out", "taken.yaml"], "is there already", "--out ANOTHER.yaml"),
    "a flag of another command": (["--plan"], "--plan", "soup --help"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, capsys):
    shutil.copy(DATA / "soup-cli/galore.yaml", "cli.yaml")
    shutil.copy("cli.yaml", "dpo.yaml")
    shutil.copy(DATA / "trl/sft_minimal.yaml", "trl.yaml")
    Path("bad.yaml").write_text("a: [1")
    Path("other.yaml").write_text("learning_rate: 1\n")
    Path("both.yaml").write_text("model_name_or_path: m\nuse_peft: true\nstage: sft\n")
    Path("taken.yaml").write_text("mine: 1\n")
    words, why, fix = REFUSED[case]
    assert main(["import", *words]) == 2
    shown = capsys.readouterr().err
    assert why in shown and fix in shown, shown
    assert Path("taken.yaml").read_text() == "mine: 1\n"


def test_the_task_of_trls_command_line():
    found = translate(TOOLS["trl"], read(DATA / "trl/dpo_qlora.yaml") | {TASK: "kto"})
    assert found.chosen["task"][0] == "kto" and found.put["task.beta"] == (0.01, "beta")
    assert found.left["lora_target_modules"].startswith("PEFT's own choice")
