"""The choice of attention kernels, over machines that are not here; and what really loads, on this one."""

from __future__ import annotations

import pytest

from soup.errors import Refused
from soup.model.attention import FLASH, Situation, choose, described, missing, refuse_unfit

HERE = dict.fromkeys(FLASH)  # both import
H100, A100, B200, T4 = (9, 0), (8, 0), (10, 0), (7, 5)


def on(capability=H100, broken=None, **more):
    given = {"dtype": "bfloat16", "head": 128, "model": "LlamaForCausalLM", "flash": True, "sdpa": True}
    return Situation(device="cuda", capability=capability, broken=HERE | (broken or {}), **given | more)


NOT_THERE = {"v3": "flash-attn-3 is not installed", "v2": "flash-attn is not installed"}
CHOICES = {
    "Hopper": (on(), "flash_attention_3", "newest"),
    "Hopper without v3": (on(broken={"v3": NOT_THERE["v3"]}), "flash_attention_2", "flash-attn-3 is not installed"),
    "Ampere": (on(A100), "flash_attention_2", "flash-attn-3 needs a Hopper GPU"),
    "Blackwell": (on(B200), "flash_attention_2", "compute capability is 10.0"),
    "Turing": (on(T4), "sdpa", "flash-attn needs an Ampere GPU"),
    "nothing installed": (on(broken=NOT_THERE), "sdpa", "flash-attn is not installed"),
    "float32": (on(dtype="float32"), "sdpa", "products are float32"),
    "float16": (on(dtype="float16"), "flash_attention_3", "newest"),
    "a wide head": (on(head=512), "sdpa", "have 512"),
    "an odd head": (on(head=100), "sdpa", "steps of 8"),
    "a class without it": (on(flash=False), "sdpa", "LlamaForCausalLM has no FlashAttention"),
    "attention dropout": (on(dropout=0.1), "flash_attention_2", "no dropout"),
    "no GPU": (Situation(device="cpu", sdpa=True), "sdpa", "no CUDA device"),
    "no GPU, no sdpa": (Situation(device="cpu", sdpa=False, model="Bloom"), "eager", "Bloom has no"),
}  # fmt: skip


@pytest.mark.parametrize(("situation", "implementation", "reason"), CHOICES.values(), ids=CHOICES.keys())
def test_auto_takes_the_newest_that_can_run(situation, implementation, reason):
    choice = choose("auto", situation)
    assert choice.implementation == implementation
    assert reason in choice.reason


@pytest.mark.parametrize(("situation", "implementation", "_"), CHOICES.values(), ids=CHOICES.keys())
def test_a_version_that_is_asked_for_runs_or_is_refused(situation, implementation, _):
    for asked, kernels in FLASH.items():
        newer = asked == "v2" and implementation == "flash_attention_3"
        if implementation == kernels.implementation or newer:
            assert choose(asked, situation).implementation == kernels.implementation
            continue
        with pytest.raises(Refused, match=f"training.use_flash_attn={asked}: .*"):
            choose(asked, situation)


@pytest.mark.parametrize("situation", [one for one, *_ in CHOICES.values()], ids=CHOICES.keys())
def test_off_is_never_flash(situation):
    choice = choose("off", situation)
    assert choice.implementation in ("sdpa", "eager") and "training.use_flash_attn=off" in choice.reason


def test_what_it_says():
    assert str(choose("auto", Situation(device="cpu"))) == "sdpa, because no CUDA device"


def test_heads_and_dropout_of_config_files():
    assert described({"hidden_size": 64, "num_attention_heads": 4}) == {"head": 16, "dropout": 0.0}
    assert described({"n_embd": 768, "n_head": 12, "attn_pdrop": 0.1}) == {"head": 64, "dropout": 0.1}
    assert described({"hidden_size": 64, "num_attention_heads": 4, "head_dim": 128})["head"] == 128
    deepseek = {
        "hidden_size": 7168,
        "num_attention_heads": 128,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
    }
    assert described(deepseek)["head"] == 192
    assert described({"text_config": {"hidden_size": 64, "num_attention_heads": 2}})["head"] == 32


def test_a_plan_refuses_what_no_machine_could_run():
    with pytest.raises(Refused, match="this model's have 100"):
        refuse_unfit("v2", {"hidden_size": 200, "num_attention_heads": 2}, "cuda", "bfloat16")
    refuse_unfit("v2", {"hidden_size": 256, "num_attention_heads": 2}, "cuda", "bfloat16")
    refuse_unfit("auto", {"hidden_size": 200, "num_attention_heads": 2}, "cuda", "float32")


def test_packages_are_those_that_transformers_takes():
    from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX as LIBRARY

    for name, kernels in FLASH.items():
        there = LIBRARY[int(name[1])]
        installed = there["pkg_availability_check"]()
        assert (missing(name) is None) == installed
        assert f"flash_attention_{there['flash_attn_version']}" == kernels.implementation


def test_the_table_of_liger_is_the_library_s():
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    from soup.model.liger import TYPES

    assert set(MODEL_TYPE_TO_APPLY_LIGER_FN) == TYPES


def test_liger_is_refused_where_it_would_change_nothing():
    from soup.model.liger import refuse_unfit

    refuse_unfit(True, {"model_type": "llama"}, "all-linear")
    refuse_unfit(False, {"model_type": "gpt2"}, "all-linear")
    with pytest.raises(Refused, match="no kernels for model_type=gpt2"):
        refuse_unfit(True, {"model_type": "gpt2"}, "all-linear")
    with pytest.raises(Refused, match="would not be trained"):
        refuse_unfit(True, {"model_type": "llama"}, ["q_proj", "lm_head"])


def test_what_is_not_installed_is_refused_before_anything_loads(tree):
    from soup import schema
    from soup.cli.check import _here
    from soup.device import resolve

    config = schema.check(tree("training.use_flash_attn=v2", "launch.device=cuda"))
    if missing("v2") is None:
        pytest.skip("flash-attn is installed")
    (found,) = (one for one in _here(config, resolve("cuda")) if one.key == "training.use_flash_attn")
    assert found.why == "flash-attn is not installed" and "pip install flash-attn" in found.fix


@pytest.mark.parametrize(
    ("words", "model", "why"),
    [
        ("training.use_liger=true", {"model_type": "gpt2"}, "no kernels for model_type=gpt2"),
        ("training.use_flash_attn=v2", {"head_dim": 300}, "this model's have 300"),
        ("training.use_flash_attn=v3", {"attention_dropout": 0.1}, "no dropout"),
        ("training.use_flash_attn=v2", {"attention_dropout": 0.1}, None),
        ("training.use_liger=true", {}, None),
    ],
)
def test_a_plan_for_a_gpu(tree, words, model, why):
    from soup import schema
    from soup.device import resolve
    from soup.plan import Lengths, plan

    lengths = Lengths(
        rows=100, mean=50.0, p50=50, p95=60, max=64, tokens=5000, learnt=2000, sampled=False, eval_rows=0
    )
    described = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    arguments = {"model": described | model, "device": resolve("cuda"), "lengths": lengths}
    config = schema.check(tree(words, "launch.device=cuda"))
    if why is None:
        assert plan(config, **arguments).steps == 4
        return
    with pytest.raises(Refused, match=why):
        plan(config, **arguments)
