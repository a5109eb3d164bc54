"""Mixtures of experts: what an honest build shows, and what a library does that drops a setting."""

from __future__ import annotations

import dataclasses

import pytest
import torch

KINDS = ("mixtral", "qwen3_moe", "deepseek_v3")
EXPERTS = "training.moe_lora=true"
ADAPTED = (
    EXPERTS,
    "lora=lora",
    "lora=none",
    "lora=dora",
    f"{EXPERTS} lora=loraplus",
    f"{EXPERTS} lora=rslora",
    f"{EXPERTS} training.freeze_layers=1",
    f"{EXPERTS} training.gradient_checkpointing=true",
    f"{EXPERTS} training.packing=true lora.target_modules=[o_proj]",
    f"{EXPERTS} training.neftune_alpha=5",
    f"{EXPERTS} optim=adamw_8bit model.dtype=float32",
)
COEFFICIENT = "training.moe_aux_loss_coeff"
BALANCED = {
    "sft": "task=sft",
    "pretrain": "task=pretrain training.packing=true",
    "dpo": "task=dpo",
    "ipo": "task=ipo lora=none",
    "kto": "task=kto",
    "orpo": "task=orpo",
    "simpo": "task=simpo lora=none",
    "grpo": "task=grpo task.max_completion_length=8",
}


@pytest.mark.parametrize("words", ADAPTED)
@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_in_force(expert_model, build, wrong, kind, words):
    assert wrong(build(f"model.base={expert_model(kind)}", *words.split())) == {}


@pytest.mark.parametrize("asked", ["null", "0.0", "0.5"])
@pytest.mark.parametrize("task", BALANCED)
def test_the_loss_has_the_balancing_term_that_is_asked_for(expert_model, build, task, asked):
    """Mixtral's own coefficient is 0.02 here, TRL's 0.001."""
    from soup import effects

    words = f"model.base={expert_model('mixtral')} {BALANCED[task]} {COEFFICIENT}={asked}"
    built = build(*words.split())
    found = {effect.key: effect for effect in effects.prove(built)}
    assert {key: effect for key, effect in found.items() if not effect.ok} == {}
    assert found[COEFFICIENT].effective == pytest.approx({"null": 0.02}.get(asked) or float(asked))


@pytest.mark.parametrize("task", ["reward", "sft"])
def test_no_balancing_term_where_there_is_none(expert_model, build, wrong, task):
    kind = {"reward": "mixtral", "sft": "deepseek_v3"}[task]
    built = build(f"model.base={expert_model(kind)}", f"task={task}", EXPERTS)
    assert wrong(built) == {}
    assert not getattr(built.trainer, "aux_loss_enabled", False)


def test_the_formula_is_that_of_transformers():
    """Over layers and tokens that are no padding, and against the definition on tokens that all choose alike."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    from soup.effects.moe import balancing_loss

    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(12, 5, generator=generator) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    theirs = load_balancing_loss_func(tuple(logits), 5, 2, mask)
    assert balancing_loss(logits, mask.reshape(-1), 2) == pytest.approx(float(theirs), rel=1e-6)
    assert balancing_loss(logits, None, 2) != pytest.approx(float(theirs), rel=1e-3)
    certain = torch.full((7, 4), -50.0)
    certain[:, 1] = 50.0
    assert balancing_loss([certain], None, 1) == pytest.approx(4)
    assert balancing_loss([torch.zeros(7, 4)], None, 1) == pytest.approx(1)


def no_parameters(patch):
    from peft.tuners.tuners_utils import BaseTuner

    patch.setattr(BaseTuner, "_inject_parameters", lambda *_, **__: [])


def one_parameter(patch):
    from peft.tuners.tuners_utils import BaseTuner

    inject = BaseTuner._inject_parameters

    def half(self, peft_config, **rest):
        peft_config.target_parameters = sorted(peft_config.target_parameters)[:1]
        return inject(self, peft_config=peft_config, **rest)

    patch.setattr(BaseTuner, "_inject_parameters", half)


def idle_wrapper(patch):
    from peft.tuners.lora.layer import ParamWrapper

    patch.setattr(ParamWrapper, "forward", lambda self, *args, **rest: self.base_layer(*args, **rest))


def other_rank(patch):
    from peft.tuners.lora.layer import ParamWrapper

    update = ParamWrapper.update_layer
    patch.setattr(
        ParamWrapper, "update_layer", lambda self, name, r, **rest: update(self, name, 2 * r, **rest)
    )


def experts_unasked(patch):
    """As PEFT does by itself with all-linear."""
    from soup.model import experts

    place = experts.place

    def everywhere(adapters, model, training):
        return place(adapters, model, dataclasses.replace(training, moe_lora=True))

    patch.setattr(experts, "place", everywhere)


def config_ignored(patch):
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained

    def ignoring(*args, router_aux_loss_coef=None, **rest):  # noqa: ARG001
        return load(*args, **rest)

    patch.setattr(AutoModelForCausalLM, "from_pretrained", ignoring)


def other_formula(patch):
    from transformers.models.mixtral import modeling_mixtral

    true = modeling_mixtral.load_balancing_loss_func
    patch.setattr(modeling_mixtral, "load_balancing_loss_func", lambda *args, **rest: true(*args, **rest) / 2)


def argument_dropped(task):
    def before(patch):
        import trl

        kind = getattr(trl, f"{task}Config")
        patch.setattr(
            kind,
            "__setattr__",
            lambda self, name, value: object.__setattr__(
                self, name, 0.001 if name == "router_aux_loss_coef" else value
            ),
        )

    return before


def trained_router(built):
    next(p for n, p in built.model.named_parameters() if n.endswith("gate.weight")).requires_grad_(True)


def moved_expert(built):
    parameter = next(p for n, p in built.model.named_parameters() if n.endswith("down_proj"))
    with torch.no_grad():
        parameter[3, 0, 0] += 1


def off(built):
    built.trainer.aux_loss_enabled = False
    built.model.config.output_router_logits = False


BEFORE = {
    "PEFT ignores target_parameters": (EXPERTS, no_parameters, "training.moe_lora"),
    "PEFT adapts one of them": (EXPERTS, one_parameter, "training.moe_lora"),
    "PEFT computes without them": (EXPERTS, idle_wrapper, "training.moe_lora"),
    "PEFT gives them another rank": (EXPERTS, other_rank, "training.moe_lora"),
    "experts that nobody asked for": ("", experts_unasked, "training.moe_lora"),
    "the loader ignores it": (f"{COEFFICIENT}=0.5", config_ignored, COEFFICIENT),
    "half of the loss": (f"{COEFFICIENT}=0.5", other_formula, COEFFICIENT),
    "half of the model's own": ("task=dpo", other_formula, COEFFICIENT),
    "TRL's own, SFT": ("", argument_dropped("SFT"), COEFFICIENT),
    "TRL's own, DPO": (f"{COEFFICIENT}=0.5 task=dpo", argument_dropped("DPO"), COEFFICIENT),
}
AFTER = {
    "the router trains": ("", trained_router, "training.moe_lora"),
    "the router trains beside experts": (EXPERTS, trained_router, "training.moe_lora"),
    "another expert": (EXPERTS, moved_expert, "model.base"),
    "another expert, all weights": ("lora=none", moved_expert, "model.base"),
    **{
        f"{task} adds nothing": (f"{BALANCED[task]} {COEFFICIENT}=0.1", off, COEFFICIENT)
        for task in ("sft", "dpo", "kto", "orpo", "simpo", "grpo")
    },
}


@pytest.mark.parametrize(("words", "before", "key"), BEFORE.values(), ids=BEFORE.keys())
def test_a_library_drops_it(expert_model, build, wrong, monkeypatch, words, before, key):
    before(monkeypatch)
    assert key in wrong(build(f"model.base={expert_model('mixtral')}", *words.split()))


@pytest.mark.parametrize(("words", "after", "key"), AFTER.values(), ids=AFTER.keys())
def test_the_build_is_spoilt(expert_model, build, wrong, words, after, key):
    built = build(f"model.base={expert_model('mixtral')}", *words.split())
    after(built)
    assert key in wrong(built)


SHARED = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
FAMILIES = {
    "qwen2_moe": SHARED,
    "qwen3_next": SHARED
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "head_dim": 16}
    | {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
    "olmoe": {"num_experts": 4},
    "flex_olmo": {"num_experts": 4},
    "gpt_oss": {
        "num_local_experts": 4,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "minimax_m2": {"num_local_experts": 4, "head_dim": 16},
    "jamba": {"num_experts": 4, "mamba_d_state": 8, "use_mamba_kernels": False}
    | {f"{what}_layer_{how}": n for what in ("expert", "attn") for how, n in (("period", 2), ("offset", 1))},
    "glm4_moe": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "first_k_dense_replace": 1,
    },
    "granitemoe": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
}


def test_each_family_that_is_said_to_balance_is_tested():
    from soup.rules.moe import BALANCED

    assert {"mixtral", "qwen3_moe", *FAMILIES} >= BALANCED


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "gpt_oss" else pytest.mark.slow) for kind in FAMILIES]
)
def test_other_families(expert_model, build, wrong, kind):
    from soup.rules.moe import BALANCED

    settings = {"num_key_value_heads": 2} | FAMILIES[kind]
    words = [f"model.base={expert_model(kind, **settings)}", EXPERTS]
    words += [f"{COEFFICIENT}=0.3"] if kind in BALANCED else []
    if kind == "jamba":  # passes an adapter on dt_proj by, which the plan refuses
        words += ["lora.target_modules=[q_proj,v_proj,in_proj]"]
    assert wrong(build(*words)) == {}
    assert wrong(build(*words, "task=dpo")) == {}
