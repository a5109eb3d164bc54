"""What a real bug in a library would do, and does not show where settings are held: each is refused."""

from __future__ import annotations

import functools
import json

import pytest

from tests.effects.test_sabotage import GALORE, LOAD, steps_with

NOISY = "training.neftune_alpha=5.0"


def noise_alike(patch):
    """The same noise in each pass."""
    import torch

    real = torch.Tensor.uniform_

    def drawn(self, *bounds, **_):
        return real(self, *bounds, generator=torch.Generator().manual_seed(1))

    patch.setattr(torch.Tensor, "uniform_", drawn)


def noise_of_the_width_alone(patch):
    from soup.train import neftune

    patch.setattr(neftune.math, "sqrt", lambda area: (area / 16) ** 0.5)


def embedding_without_hooks(patch):
    """The model looks its embedding's weights up itself."""
    import torch
    from torch.nn import Module

    real = Module.register_forward_hook

    def register(self, hook, **given):
        if isinstance(self, torch.nn.Embedding) and hook.__name__ == "noisy":
            self.forward = functools.partial(torch.nn.functional.embedding, weight=self.weight)
        return real(self, hook, **given)

    patch.setattr(Module, "register_forward_hook", register)
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def looks_up(self, input_ids=None, inputs_embeds=None, **given):  # noqa: ARG001
        embeds = torch.nn.functional.embedding(input_ids, self.embed_tokens.weight)
        return forward(self, inputs_embeds=embeds, **given)

    patch.setattr(LlamaModel, "forward", looks_up)


def thawed_with_the_optimizer(patch):
    from transformers import Trainer

    real = Trainer.create_optimizer

    def create(self, *given):
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return real(self, *given)

    patch.setattr(Trainer, "create_optimizer", create)


def stepped_though_frozen(patch):
    """The optimizer has the tensors of every layer."""
    from transformers import Trainer

    real = Trainer.create_optimizer

    def create(self, *given):
        made = real(self, *given)
        made.param_groups[0]["params"] += [p for p in self.model.parameters() if not p.requires_grad]
        return made

    patch.setattr(Trainer, "create_optimizer", create)


def trained_at_a_factor_of(scale):
    """transformers divides a micro-step's loss by something else than the number of them."""

    def before(patch):
        from accelerate import Accelerator

        real = Accelerator.backward
        patch.setattr(Accelerator, "backward", lambda self, loss, **given: real(self, loss * scale, **given))

    return before


def tokens_of_one_micro_step(patch):
    """The mean over tokens is that of each micro-step, and their sum is stepped."""
    from transformers import Trainer

    real = Trainer._get_num_items_in_batch
    patch.setattr(
        Trainer, "_get_num_items_in_batch", lambda self, batches, device: real(self, batches[:1], device)
    )


def clipped_one_by_one(patch):
    """Each tensor's gradient has a norm of its own."""
    import torch
    from accelerate import Accelerator

    def clip(_self, parameters, largest, **_):
        return max(torch.nn.utils.clip_grad_norm_([p], largest) for p in parameters if p.grad is not None)

    patch.setattr(Accelerator, "clip_grad_norm_", clip)


def clipped_by_value(patch):
    import torch
    from accelerate import Accelerator

    def clip(_self, parameters, largest, **_):
        torch.nn.utils.clip_grad_value_(parameters, largest)
        return torch.tensor(largest)

    patch.setattr(Accelerator, "clip_grad_norm_", clip)


def rate_that_stays(patch):
    from torch.optim.lr_scheduler import LambdaLR

    real = LambdaLR.step

    def still(self, *given):
        kept = [group["lr"] for group in self.optimizer.param_groups]
        real(self, *given)
        for group, rate in zip(self.optimizer.param_groups, kept, strict=True):
            group["lr"] = rate

    patch.setattr(LambdaLR, "step", still)


def schedule_of_the_first_group(patch):
    from torch.optim.lr_scheduler import LambdaLR

    real = LambdaLR.get_lr
    patch.setattr(LambdaLR, "get_lr", lambda self: [*real(self)[:1], *self.base_lrs[1:]])


def no_warm_up(patch):
    import transformers.optimization as library

    real = library.get_cosine_schedule_with_warmup
    patch.setitem(
        library.TYPE_TO_SCHEDULER_FUNCTION,
        library.SchedulerType.COSINE,
        lambda optimizer, num_warmup_steps, **given: real(optimizer, num_warmup_steps=0, **given),  # noqa: ARG005
    )


def smoothed(patch):
    from transformers import Trainer

    real = Trainer.__init__

    def init(self, *given, **named):
        real(self, *given, **named)
        from transformers.trainer_pt_utils import LabelSmoother

        self.label_smoother = LabelSmoother(epsilon=0.1)

    patch.setattr(Trainer, "__init__", init)


def faster_a(patch):
    """LoRA+'s ratio goes to A."""
    from soup.train import trainer

    real = trainer.create_loraplus_optimizer

    def swapped(model, *given, loraplus_lr_ratio, **settings):
        made = real(model, *given, loraplus_lr_ratio=loraplus_lr_ratio, **settings)
        names = {id(p): name for name, p in model.named_parameters()}
        for group in made.param_groups:
            kinds = {"B" if "lora_B" in names[id(p)] else "A" for p in group["params"]}
            base = settings["lr"]
            group["lr"] = base if kinds == {"B"} else base * loraplus_lr_ratio
        return made

    patch.setattr(trainer, "create_loraplus_optimizer", swapped)


def one_layer_kept(patch):
    from transformers import PreTrainedModel

    real = PreTrainedModel.gradient_checkpointing_enable

    def enable(self, *given, **named):
        real(self, *given, **named)
        layer = next(m for m in self.modules() if type(m).__name__ == "LlamaDecoderLayer")
        layer.gradient_checkpointing = False

    patch.setattr(PreTrainedModel, "gradient_checkpointing_enable", enable)


def name_left_plain(patch):
    """All layers of one name stay as they are."""
    import soup.model.load as load

    real = load.BitsAndBytesConfig
    patch.setattr(
        load, "BitsAndBytesConfig", lambda **given: real(**given, llm_int8_skip_modules=["v_proj", "lm_head"])
    )


def shuffled_by_accelerate(patch):
    import accelerate.data_loader as library

    real = library.prepare_data_loader

    def prepare(loader, *given, **named):
        import torch

        loader = real(loader, *given, **named)
        inner = torch.utils.data.RandomSampler(loader.dataset)
        loader.batch_sampler.sampler = inner
        return loader

    patch.setattr(library, "prepare_data_loader", prepare)
    patch.setattr("accelerate.accelerator.prepare_data_loader", prepare)


def cut_from_the_left(patch):
    """Collators keep the end of what is too long."""
    from trl.trainer import sft_trainer

    kind = sft_trainer.DataCollatorForLanguageModeling
    real = kind.torch_call

    def call(self, rows):
        return real(self, [{name: values[-60:] for name, values in row.items()} for row in rows])

    patch.setattr(kind, "torch_call", call)


def read_as_it_looks(patch):
    """A loader that recognises each row's format, whatever it was told."""
    import soup.data.shapes as shapes

    real = shapes.normalise
    patch.setattr(shapes, "normalise", lambda fields, _: real(fields, "messages"))


def sharper_positions(patch):
    """Sines and cosines are multiplied though nothing is scaled."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding as Rotary

    real = Rotary.forward
    patch.setattr(
        Rotary, "forward", lambda *given, **named: tuple(1.2 * part for part in real(*given, **named))
    )


def frequencies_of_16_bits(patch):
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained

    def load(*given, **named):
        import torch

        model, told = real(*given, **named)
        for module in model.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq = module.inv_freq.to(torch.bfloat16)
        return model, told

    patch.setattr(AutoModelForCausalLM, "from_pretrained", load)


BOTH = "data.train=both.jsonl data.format=alpaca"
BEFORE = {
    "the same noise in each pass": (NOISY, noise_alike, "training.neftune_alpha"),
    "noise of the width alone": (NOISY, noise_of_the_width_alone, "training.neftune_alpha"),
    "a model that looks up its embedding": (
        f"{NOISY} backend.kernels=stock",
        embedding_without_hooks,
        "training.neftune_alpha",
    ),
    "thawed when the optimizer is made": (
        "training.freeze_layers=1 lora=none",
        thawed_with_the_optimizer,
        "training.freeze_layers",
    ),
    "thawed when the optimizer is made, adapters": ("", thawed_with_the_optimizer, "lora.target_modules"),
    "frozen layers in the optimizer": (
        "training.freeze_layers=1 lora=none",
        stepped_though_frozen,
        "training.freeze_layers",
    ),
    "a loss that is not divided": (
        "training.gradient_accumulation_steps=3",
        trained_at_a_factor_of(3),
        "training.gradient_accumulation_steps",
    ),
    "a loss that is not divided, DPO": (
        "task=dpo training.gradient_accumulation_steps=2",
        trained_at_a_factor_of(2),
        "training.gradient_accumulation_steps",
    ),
    "a loss that is not divided, GRPO": (
        "task=grpo training.gradient_accumulation_steps=2 task.loss_type=grpo",
        trained_at_a_factor_of(2),
        "training.gradient_accumulation_steps",
    ),
    "a loss that is divided though nothing accumulates": (
        "task=orpo",
        trained_at_a_factor_of(0.5),
        "training.gradient_accumulation_steps",
    ),
    "the mean of each micro-step": (
        "training.gradient_accumulation_steps=2",
        tokens_of_one_micro_step,
        "training.gradient_accumulation_steps",
    ),
    "a norm for each tensor": ("training.max_grad_norm=0.1", clipped_one_by_one, "training.max_grad_norm"),
    "clipped by value": ("training.max_grad_norm=0.1 lora=none", clipped_by_value, "training.max_grad_norm"),
    "a rate that stays": ("", rate_that_stays, "optim.scheduler"),
    "a schedule of the first group": ("lora=loraplus", schedule_of_the_first_group, "optim.scheduler"),
    "a rate that stays, schedule-free": (
        "optim=schedule_free optim.warmup_ratio=0.5",
        rate_that_stays,
        "optim.warmup_ratio",
    ),
    "no warm-up": ("optim.warmup_ratio=0.5", no_warm_up, "optim.warmup_ratio"),
    "schedule-free steps with its own epsilon": (
        "optim=schedule_free optim.eps=1e-6",
        steps_with("schedulefree.AdamWScheduleFree", "eps", 1e-8),
        "optim.eps",
    ),
    "GaLore steps with its own epsilon": (
        f"{GALORE} optim.eps=1e-6",
        steps_with("galore_torch.GaLoreAdamW", "eps", 1e-8),
        "optim.eps",
    ),
    "8-bit AdamW steps with its own epsilon": (
        "optim=adamw_8bit optim.eps=1e-6",
        steps_with("bitsandbytes.optim.AdamW", "eps", 1e-8),
        "optim.eps",
    ),
    "labels smoothed": ("backend.kernels=stock", smoothed, "task.name"),
    "LoRA+'s ratio for A": ("lora=loraplus", faster_a, "lora.loraplus_lr_ratio"),
    "a layer that is not recomputed": (
        "training.gradient_checkpointing=true",
        one_layer_kept,
        "training.gradient_checkpointing",
    ),
    "a name in full precision, 4bit": ("model.quantization=4bit", name_left_plain, "model.quantization"),
    "a name in full precision, 8bit": ("model.quantization=8bit", name_left_plain, "model.quantization"),
    "rows shuffled by accelerate": (
        "training.curriculum=true training.max_steps=null",
        shuffled_by_accelerate,
        "training.curriculum",
    ),
    "rows shuffled by accelerate anew": ("", shuffled_by_accelerate, "training.data_seed"),
    "cut from the left": ("backend.kernels=stock", cut_from_the_left, "data.format"),
    # Of another length, so that the cache has no rows that an honest build would take.
    "rows read as they look": (f"{BOTH} data.max_length=200", read_as_it_looks, "data.format"),
    "rows read as they look, a stream": (f"{BOTH} data.streaming=true", read_as_it_looks, "data.format"),
    "sharper positions": ("", sharper_positions, "longctx.rope_scaling_type"),
    "frequencies of 16 bits": (
        "longctx=yarn longctx.rope_factor=4.0",
        frequencies_of_16_bits,
        "longctx.rope_scaling_type",
    ),
    "frequencies of 16 bits, unscaled": ("", frequencies_of_16_bits, "longctx.rope_scaling_type"),
    "a loader in another precision": ("model.dtype=float32", LOAD(dtype="bfloat16"), "model.dtype"),
}


@pytest.fixture(autouse=True)
def both(tmp_path):
    """Rows that are of two formats."""
    rows = [
        {
            "instruction": f"Which number follows {number}?",
            "output": f"It is the number {number + 1}, of course.",
            "messages": [
                {"role": "user", "content": f"Say something of {number}."},
                {"role": "assistant", "content": f"There is nothing that is said of {number}."},
            ],
        }
        for number in range(40)
    ]
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(("words", "before", "key"), BEFORE.values(), ids=BEFORE.keys())
def test_a_library_drops_it(build, wrong, monkeypatch, tmp_path, words, before, key):
    before(monkeypatch)
    assert key in wrong(
        build(*(word.replace("both.jsonl", f"{tmp_path}/both.jsonl") for word in words.split()))
    )


@pytest.mark.parametrize(
    "words",
    [
        BOTH,
        f"{BOTH} data.streaming=true",
        BOTH.replace("alpaca", "messages"),
        f"{BOTH} task=pretrain training.packing=true data.eval_fraction=0.2",
        f"{BOTH} task=grpo task.max_completion_length=8",
        "training.gradient_accumulation_steps=3 lora.dropout=0.2 training.neftune_alpha=5.0",
        "optim=schedule_free optim.warmup_ratio=0.5 training.gradient_accumulation_steps=2",
        "task=kto training.gradient_accumulation_steps=2",
        "task=reward training.gradient_accumulation_steps=2 model.quantization=4bit",
        "task=simpo training.gradient_accumulation_steps=4 model.dtype=bfloat16 lora=none",
    ],
)
def test_an_honest_build_is_in_force(build, wrong, tmp_path, words):
    built = build(*(word.replace("both.jsonl", f"{tmp_path}/both.jsonl") for word in words.split()))
    assert wrong(built) == {}


def table_of_other_rows(built):
    """The reference's numbers of all rows but the first are those of the row before."""
    import pyarrow as pa

    rows = built.trainer.train_dataset
    kept = rows["ref_chosen_logps"][:]
    moved = [kept[0], *kept[2:], kept[1]]
    built.trainer.train_dataset = rows.remove_columns("ref_chosen_logps").add_column(
        "ref_chosen_logps", pa.array(moved, pa.float32())
    )


def test_a_table_of_other_rows(build, wrong):
    built = build("task=dpo", "task.precompute_ref=true")
    assert wrong(built) == {}
    table_of_other_rows(built)
    assert "task.precompute_ref" in wrong(built)


def one_expert(patch):
    """PEFT adds the first expert's adapter alone."""
    from peft.tuners.lora.layer import ParamWrapper

    real = ParamWrapper.get_delta_factors

    def first(self, *given):
        import torch

        left, right, scale = real(self, *given)
        keep = torch.zeros(len(left), 1, 1)
        keep[0] = 1
        return left * keep, right, scale

    patch.setattr(ParamWrapper, "get_delta_factors", first)


def unscaled_experts(patch):
    from peft.tuners.lora.layer import ParamWrapper

    real = ParamWrapper.get_delta_factors
    patch.setattr(ParamWrapper, "get_delta_factors", lambda self, *given: (*real(self, *given)[:2], 1.0))


@pytest.mark.parametrize("sabotage", [one_expert, unscaled_experts])
def test_adapters_on_experts(expert_model, build, wrong, monkeypatch, sabotage):
    sabotage(monkeypatch)
    assert "training.moe_lora" in wrong(
        build(f"model.base={expert_model('mixtral')}", "training.moe_lora=true")
    )


GROUP = ("task=grpo", "task.max_completion_length=8", "task.rewards=[length:3,json]")


def other_rewards(built):
    """Of the right names."""
    names = [function.__name__ for function in built.trainer.reward_funcs]

    def constant(name):
        def reward(completions, **_):
            return [1.0] * len(completions)

        reward.__name__ = name
        return reward

    built.trainer.reward_funcs = [constant(name) for name in names]


def attribute(name, value):
    return lambda built: setattr(built.trainer, name, value)


def weights_ignored(built):
    import torch

    real = built.trainer._calculate_rewards
    held = built.trainer.reward_weights
    built.trainer._calculate_rewards = lambda *given: real(*given) / held.clamp(min=1e-6)
    assert isinstance(held, torch.Tensor)


def reference_of_the_policy(patch):
    """Adapters stay on while the reference is asked."""
    import contextlib

    patch.setattr("trl.trainer.grpo_trainer.use_adapter", lambda *_, **__: contextlib.nullcontext())


def greedy(built):
    """The model is asked for what is likeliest."""
    import copy

    trainer, real = built.trainer, built.trainer._generate_single_turn

    def turn(*given, **named):
        kept = trainer.generation_config
        trainer.generation_config = copy.deepcopy(kept)
        trainer.generation_config.do_sample = False
        try:
            return real(*given, **named)
        finally:
            trainer.generation_config = kept

    trainer._generate_single_turn = turn


def endless(built):
    trainer = built.trainer
    real = trainer._generate_single_turn

    def turn(*given, **named):
        kept, trainer.generation_config.max_new_tokens = trainer.generation_config.max_new_tokens, 99
        try:
            return real(*given, **named)
        finally:
            trainer.generation_config.max_new_tokens = kept

    trainer._generate_single_turn = turn


AFTER = {
    "other rewards of these names": ("", other_rewards, "task.rewards"),
    "groups of another size": ("", attribute("num_generations", 2), "task.num_generations"),
    "advantages that are not scaled": ("", attribute("scale_rewards", "none"), "task.rewards"),
    "advantages of the batch": ("", attribute("scale_rewards", "batch"), "task.rewards"),
    "weights that are ignored": ("task.reward_weights=[1.0,0.2]", weights_ignored, "task.reward_weights"),
    "answers that are not sampled": ("", greedy, "task.temperature"),
    "longer answers": ("", endless, "task.max_completion_length"),
}


@pytest.mark.parametrize(("words", "after", "key"), AFTER.values(), ids=AFTER.keys())
def test_groups_that_are_scored_otherwise(build, wrong, words, after, key):
    built = build(*GROUP, *words.split())
    assert wrong(built) == {}
    after(built)
    assert key in wrong(built)


def test_a_reference_that_is_the_policy(build, wrong, monkeypatch):
    built = build(*GROUP, "task.beta=0.1")
    assert wrong(built) == {}
    reference_of_the_policy(monkeypatch)
    assert "task.beta" in wrong(built)


def test_a_reward_of_ones_own_is_that_of_the_file(build, wrong, tmp_path):
    """It is not called."""
    file = tmp_path / "mine.py"
    file.write_text("def mine(prompts, completions, **_):\n    raise RuntimeError\n")
    built = build("task=grpo", f"task.rewards=[{file}:mine,length:3]", "task.reward_weights=[0.5,2.0]")
    assert wrong(built) == {}
    built.trainer.reward_funcs[0] = functools.wraps(print)(lambda completions, **_: [1.0] * len(completions))
    built.trainer.reward_funcs[0].__name__ = f"{file}:mine"
    assert "task.rewards" in wrong(built)


def test_ppo_that_does_not_accumulate(build, wrong, scorer):
    built = build(
        "task=ppo",
        f"task.reward_model={scorer}",
        "task.response_length=8",
        "training.gradient_accumulation_steps=2",
    )
    assert wrong(built) == {}
    built.trainer.accelerator.gradient_accumulation_steps = 1
    assert "training.gradient_accumulation_steps" in wrong(built)
