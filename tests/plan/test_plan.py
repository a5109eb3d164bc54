"""Predictions against the real thing: parameters of real models, steps of transformers, memory's directions."""

import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from soup.device import Device
from soup.errors import Refused
from soup.model.source import CARRIED
from soup.plan import Lengths, adapter_parameters, plan, shape
from soup.schema import check

COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_key_value_heads": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
MOE_TYPES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3")
MODELS = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32},
    "qwen3_moe-dense": {"num_experts": 4, "moe_intermediate_size": 32, "mlp_only_layers": [1]},
    "olmoe": {"num_experts": 4},
    "deepseek_v3": LATENT | {"n_shared_experts": 2},
    "deepseek_v3-biases": LATENT | {"q_lora_rank": None, "attention_bias": True, "first_k_dense_replace": 0},
}
MOE = [name for name in MODELS if name.partition("-")[0] in MOE_TYPES]
DENSE = [name for name in MODELS if name not in MOE]
CPU = Device(kind="cpu", bf16=False, reason="test")
LENGTHS = Lengths(
    rows=100, mean=50, p50=50, p95=60, max=64, tokens=5000, learnt=2500, sampled=False, eval_rows=0
)


@pytest.fixture(params=MODELS)
def real(request):
    """A model on torch's meta device, and its config.json."""
    config = AutoConfig.for_model(request.param.partition("-")[0], **(COMMON | MODELS[request.param]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model, json.loads(config.to_json_string())


def test_parameters_are_those_of_the_real_model(real):
    model, config = real
    assert shape(config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("extra", [[], ["lora=dora"], ["lora.target_modules=[q_proj,o_proj]"]])
@pytest.mark.parametrize("real", DENSE, indirect=True)
def test_adapter_parameters_are_those_of_peft(real, extra, compose):
    model, config = real
    spec = check(compose("lora.r=5", *extra)).lora
    modules = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    made = LoraConfig(r=5, target_modules=modules, use_dora=spec.use_dora, task_type="CAUSAL_LM")
    with torch.device("meta"):
        wrapped = get_peft_model(model, made)
    expected = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert adapter_parameters(check(compose("lora.r=5", *extra)), shape(config)) == expected


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("on_experts", ["false", "true"])
@pytest.mark.parametrize("real", MOE, indirect=True)
def test_adapter_parameters_are_those_of_peft_on_a_mixture(real, on_experts, frozen, compose):
    from soup.model import experts
    from soup.model.freeze import freeze
    from soup.model.load import adapter

    model, config = real
    words = ("lora.r=5", f"training.moe_lora={on_experts}", f"training.freeze_layers={frozen}")
    asked = check(compose(*words))
    made = adapter(asked.lora, frozen=freeze(model, asked.training))
    made = experts.place(made, model, asked.training)
    with torch.device("meta"):
        wrapped = get_peft_model(model, made)
    expected = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert adapter_parameters(asked, shape(config)) == expected


def planned(compose, *overrides, device=CPU, lengths=LENGTHS, model=None):
    config = json.loads(AutoConfig.for_model("llama", **COMMON).to_json_string()) | (model or {})
    return plan(check(compose(*overrides)), model=config, device=device, lengths=lengths)


@pytest.mark.parametrize("rows", [7, 8, 9, 100])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("epochs", [1, 2.5])
def test_steps_are_those_of_transformers(rows, accumulation, epochs, compose, tmp_path):
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainingArguments

    batch = 4
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        use_cpu=True,
    )
    trainer = Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=[{}] * rows)
    loader = DataLoader([{}] * rows, batch_size=batch)
    expected = trainer.set_initial_training_values(arguments, loader)[-1]
    lengths = Lengths(**(vars(LENGTHS) | {"rows": rows}))
    found = planned(
        compose,
        f"training.batch_size={batch}",
        f"training.gradient_accumulation_steps={accumulation}",
        f"training.epochs={epochs}",
        lengths=lengths,
    )
    assert found.steps == expected


def test_memory_goes_where_it_should(compose):
    def peak(*overrides):
        return planned(compose, *overrides).peak_memory_bytes

    base = peak()
    assert peak("training.batch_size=16") > base
    assert peak("data.max_length=16") < base
    assert peak("lora.r=64") > base
    assert peak("lora=none") > base
    assert peak("training.gradient_checkpointing=true") < base
    weights = [
        planned(compose, f"model.quantization={kind}").memory["weights"] for kind in ("4bit", "8bit", "none")
    ]
    assert weights == sorted(weights) and weights[0] < weights[1] < weights[2]
    sharded = planned(compose, "lora=none", "distributed=zero3", "distributed.processes=4")
    whole = planned(compose, "lora=none")
    for part in ("weights", "gradients", "optimizer"):
        assert sharded.memory[part] * 4 == pytest.approx(whole.memory[part], abs=4)
    two = planned(compose, "lora=none", "distributed=zero2", "distributed.processes=2")
    assert two.memory["weights"] == whole.memory["weights"]
    assert two.memory["optimizer"] * 2 == pytest.approx(whole.memory["optimizer"], abs=4)
    buckets = 1.5 * two.memory["buckets"] + sharded.memory["gathered"]  # scattered by gloo, and gathered
    assert sharded.memory["buckets"] == pytest.approx(buckets, abs=4)
    full, kept = (
        planned(compose, "lora=none", f"distributed={way}", "distributed.processes=2").memory
        for way in ("fsdp_full_shard", "fsdp_shard_grad")
    )
    assert full["buckets"] == kept["buckets"] == pytest.approx(full["gathered"], abs=4), (
        "copies of the one, then of the other"
    )
    assert "gathered" not in kept and kept["weights"] == 3 * full["weights"]


AWARE = ("model.quantization=4bit", "model.quantization_aware=true")


def test_simulated_quantization_costs_the_rounded_weights(compose):
    plain, aware = planned(compose), planned(compose, *AWARE)
    assert aware.memory["weights"] == plain.memory["weights"]
    kept = planned(compose, *AWARE, "training.gradient_checkpointing=true")
    recomputed = planned(compose, "training.gradient_checkpointing=true")
    rounded = [
        one.memory["activations"] - two.memory["activations"]
        for one, two in ((aware, plain), (kept, recomputed))
    ]
    assert rounded[0] > rounded[1] > 0


@pytest.mark.parametrize(
    ("overrides", "model", "key", "fix"),
    [
        ((*AWARE, "model.quantization_group_size=128"), {}, "model.quantization_group_size", "size=64"),
        (AWARE, {"intermediate_size": 104}, "model.quantization_group_size", "size=8"),
        (AWARE, {"intermediate_size": 101}, "model.quantization_group_size", "aware=false"),
        (AWARE, {"model_type": "gpt2"}, "model.quantization_aware", "another model"),
        (("model.quantization=4bit",), {"intermediate_size": 96}, "model.quantization", "8bit or none"),
    ],
)
def test_groups_of_inputs_must_come_out_even(compose, overrides, model, key, fix):
    with pytest.raises(Refused, match=fix) as refused:
        planned(compose, *overrides, model=model)
    assert refused.value.problems[0].key == key


def test_a_frozen_reference_costs_a_copy_only_where_there_is_one(compose):
    sft, dpo = planned(compose, "lora=none"), planned(compose, "lora=none", "task=dpo")
    assert dpo.memory["reference"] == dpo.memory["weights"] == sft.memory["weights"]
    early = planned(compose, "lora=none", "task=dpo", "task.precompute_ref=true")
    assert early.memory["weights"] == sft.memory["weights"]
    assert planned(compose, "task=dpo").memory["weights"] == planned(compose).memory["weights"]


def test_ppo_shows_what_each_of_its_models_takes(compose):
    scored = ("task=ppo", "task.reward_model=a folder")
    adapters, whole = planned(compose, *scored), planned(compose, *scored, "lora=none")
    assert "reference" not in adapters.memory and whole.memory["reference"] == whole.memory["weights"]
    assert whole.memory["value model"] == 4 * whole.parameters
    assert adapters.memory["reward model"] > 0
    longer = planned(compose, *scored, "task.response_length=400", "training.gradient_accumulation_steps=8")
    assert longer.memory["logits"] > adapters.memory["logits"]


def test_a_million_tokens_plan(compose):
    million = 1_048_576
    lengths = Lengths(**(vars(LENGTHS) | {"mean": million, "max": million, "tokens": 100 * million}))
    cuda = Device(kind="cuda", bf16=True, reason="test")
    words = ["longctx=yarn", f"data.max_length={million}", "training.batch_size=1"]
    one = planned(compose, *words, "backend.kernels=stock", device=cuda, lengths=lengths)
    ring = ["longctx.use_ring_attention=true", "longctx.ring_size=8", "distributed=zero3"]
    eight = planned(compose, *words, *ring, "distributed.processes=8", device=cuda, lengths=lengths)
    assert eight.memory["activations"] * 8 == pytest.approx(one.memory["activations"], rel=0.15)
    assert eight.memory["activations"] * 8 > one.memory["activations"], "keys and values come round"
    assert "2048" in one.notes["context"] and "512 = 1048576" in one.notes["context"]
    assert one.devices == eight.devices == 1, "what it takes, whatever is asked for"
    assert "80 GB each (assumed)" in one.notes["devices"]


QWEN = json.loads((CARRIED / "Qwen--Qwen2.5-7B-Instruct.json").read_text())
MILLION = ("longctx=yarn", "data.max_length=1048576", "training.batch_size=1")


@pytest.mark.parametrize(
    ("words", "devices", "ring", "said"),
    [
        ((*MILLION, "training.gradient_checkpointing=true"), 8, 8, "longctx.ring_size=8"),
        (MILLION, 128, 128, "; 8 with training.gradient_checkpointing=true"),
        (("lora=none", "training.batch_size=1"), 2, 1, "distributed=zero3 distributed.processes=2"),
        ((*MILLION, "task=dpo"), 0, 1, "rows of this task, or of this model, are not spread"),
        (("training.batch_size=1",), 1, 1, "one of 80 GB"),
    ],
)
def test_how_many_devices_it_takes(compose, words, devices, ring, said):
    cuda = Device(kind="cuda", bf16=True, reason="test")
    found = plan(check(compose(*words)), model=QWEN, device=cuda, lengths=LENGTHS)
    assert (found.devices, found.ring) == (devices, ring)
    assert said in found.notes["devices"]


def test_the_devices_hold_what_they_are_said_to_hold(compose):
    """The plan of the run that the note advises fits, and half as many devices do not."""
    cuda = Device(kind="cuda", bf16=True, reason="test")
    words = (
        *MILLION,
        "training.gradient_checkpointing=true",
        "distributed=zero3",
        "longctx.use_ring_attention=true",
    )

    def peak(devices):
        ring = (f"distributed.processes={devices}", f"longctx.ring_size={devices}")
        lengths = Lengths(**(vars(LENGTHS) | {"max": 1048576}))
        return plan(check(compose(*words, *ring)), model=QWEN, device=cuda, lengths=lengths).peak_memory_bytes

    assert peak(8) <= cuda.memory_bytes < peak(4)


@pytest.mark.parametrize("generated, task", [(0, "task=sft"), (16, "task.max_completion_length=16")])
def test_a_row_beyond_the_models_context_is_refused(generated, task, compose):
    words = [task] if generated == 0 else ["task=grpo", task]
    model = {"max_position_embeddings": LENGTHS.max + generated}
    planned(compose, *words, model=model)  # the last position is just there
    with pytest.raises(Refused, match=rf"{LENGTHS.max} tokens.* context is {LENGTHS.max + generated - 1}"):
        planned(compose, *words, model={"max_position_embeddings": LENGTHS.max + generated - 1})
    shorter = f"data.max_length={LENGTHS.max - 1}"
    planned(compose, *words, shorter, model={"max_position_embeddings": LENGTHS.max + generated - 1})
    planned(compose, *words, "longctx=yarn", model={"max_position_embeddings": 32})
    dynamic = {"max_position_embeddings": 32, "rope_parameters": {"rope_type": "dynamic", "factor": 100.0}}
    planned(compose, *words, model=dynamic)


def test_frozen_layers_have_no_adapters_no_gradients_and_no_state(compose):
    per_layer = planned(compose).trainable // 3
    assert planned(compose, "training.freeze_layers=2").trainable == per_layer
    assert planned(compose, "training.freeze_ratio=0.34").trainable == 2 * per_layer
    whole = planned(compose, "lora=none")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **COMMON))
    of_a_layer = sum(p.numel() for p in model.model.layers[0].parameters())
    frozen = planned(compose, "lora=none", "training.freeze_layers=2")
    assert whole.trainable - frozen.trainable == 2 * of_a_layer
    for part in ("gradients", "optimizer"):
        assert frozen.memory[part] < whole.memory[part]
    assert (
        planned(compose, "training.freeze_layers=2").memory["activations"]
        < planned(compose).memory["activations"]
    )


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("training.freeze_layers=3", "has 3 layers, and 2 can be frozen"),
        ("training.freeze_ratio=0.9", "has 3 layers, and 2 can be frozen"),
        ("training.freeze_ratio=0.1", "less than half of one of this model's 3 layers"),
    ],
)
def test_freezing_all_or_nothing_is_refused(compose, override, why):
    with pytest.raises(Refused, match=why):
        planned(compose, override)


def test_every_number_has_its_reason_and_parts_add_up(compose):
    found = planned(compose)
    assert sum(found.memory.values()) == found.peak_memory_bytes
    for name in (
        "parameters",
        "trainable",
        "dtype",
        "rows_per_step",
        "tokens_per_step",
        "steps",
        "memory",
        "disk",
        "devices",
    ):
        assert found.notes[name]
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_an_unknown_architecture_is_estimated_and_said_to_be(compose):
    found = planned(compose, model={"model_type": "something_new"})
    assert "estimate" in found.notes["parameters"]


def test_planning_leaves_torch_alone():
    code = "import sys, soup.plan; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rows_without_padding_take_less(compose):
    lengths = Lengths(**vars(LENGTHS) | {"max": 512, "sample": (*range(20, 400, 5), 512)})
    fast = planned(compose, "data.max_length=512", lengths=lengths)
    for words in (["backend.kernels=stock"], ["lora.dropout=0.1"], ["training.neftune_alpha=5"]):
        padded = planned(compose, "data.max_length=512", *words, lengths=lengths)
        assert fast.memory["activations"] < 0.8 * padded.memory["activations"]
        assert "without padding" in fast.notes["memory"] and "without padding" not in padded.notes["memory"]
    alike = planned(compose, "data.max_length=512", lengths=Lengths(**vars(lengths) | {"common": 100}))
    assert alike.memory["activations"] < 0.8 * fast.memory["activations"]
    pairs = planned(compose, "task=dpo", "data.max_length=512", lengths=lengths)
    asked = planned(
        compose, "task=dpo", "data.max_length=512", lengths=Lengths(**vars(lengths) | {"shared": 200.0})
    )
    assert asked.memory["activations"] < 0.8 * pairs.memory["activations"]
    stock = planned(compose, "data.max_length=512", "backend.kernels=stock", lengths=lengths)
    assert fast.memory["logits"] < 0.2 * stock.memory["logits"]


def test_an_adapter_that_a_mixer_passes_by_is_refused(compose):
    with pytest.raises(Refused, match="multiplies by the weight of dt_proj itself"):
        planned(compose, model={"model_type": "jamba"})
    for words in ("lora.target_modules=[in_proj,q_proj]", "lora=none"):
        planned(compose, words, model={"model_type": "jamba"})


def test_a_reward_model_without_a_class_that_scores_is_refused(compose):
    cohere = {"model_type": "cohere2"}
    with pytest.raises(Refused, match="no cohere2 that ends in a score"):
        planned(compose, "task=reward", model=cohere)
    planned(compose, "task=dpo", model=cohere)
    theirs = {"auto_map": {"AutoModelForSequenceClassification": "modeling.Scores"}}
    planned(compose, "task=reward", model=cohere | theirs)


def test_the_families_that_score_are_those_of_transformers():
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    from soup.plan.fits import scoring

    assert scoring() == set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)


@pytest.mark.parametrize("words", ["", "model.quantization=4bit", "backend=unsloth"])
def test_weights_that_are_stored_quantized_are_refused(compose, words):
    stored = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    with pytest.raises(Refused, match="model.base=.* stored quantized, by bitsandbytes"):
        planned(compose, *words.split(), model=stored)


@pytest.mark.parametrize(
    ("dtype", "width", "taken"),
    [("float32", 130, False), ("float32", 132, True), ("bfloat16", 132, False), ("bfloat16", 136, True)],
)
def test_experts_that_torchs_grouped_product_does_not_take_are_refused(compose, dtype, width, taken):
    config = AutoConfig.for_model("mixtral", **COMMON | MODELS["mixtral"] | {"intermediate_size": width})
    told, refused = json.loads(config.to_json_string()), f"{width} numbers of {dtype}"
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    with nullcontext() if taken else pytest.raises(RuntimeError, match="16 bytes"):
        model(torch.arange(8)[None])
    with nullcontext() if taken else pytest.raises(Refused, match=refused):
        planned(compose, f"model.dtype={dtype}", model=told)
    planned(compose, f"model.dtype={dtype}", model=told | {"model_type": "dbrx"})  # multiplies one by one
