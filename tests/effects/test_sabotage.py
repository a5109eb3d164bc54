"""One sabotage per test: a library that drops a setting or a build that went wrong, and the probe that sees it.

`before` patches a library and is in place while soup builds; `after` spoils what was built.
"""

from __future__ import annotations

import dataclasses
import functools
import types

import pytest


def dropped(*names):
    """TRL's configuration class ignores these arguments."""

    def before(monkeypatch):
        import trl

        real = trl.SFTConfig
        monkeypatch.setattr(
            trl, "SFTConfig", lambda **given: real(**{k: v for k, v in given.items() if k not in names})
        )

    return before


def without(owner, name, *arguments, **forced):
    """`owner.name`, a path, ignores these keyword arguments, and takes the forced ones."""

    def before(monkeypatch):
        module, _, attribute = owner.partition(":")
        target = functools.reduce(getattr, attribute.split(".") if attribute else [], _import(module))
        real = getattr(target, name)

        @functools.wraps(real)
        def deaf(*words, **given):
            return real(*words, **({k: v for k, v in given.items() if k not in arguments} | forced))

        monkeypatch.setattr(target, name, deaf)

    def _import(module):
        import importlib

        return importlib.import_module(module)

    return before


LORA = functools.partial(without, "soup.model.load", "LoraConfig")
LOAD = functools.partial(without, "transformers:AutoModelForCausalLM", "from_pretrained")
DATA = functools.partial(without, "soup.train.build", "prepare")


def no_seed(monkeypatch):
    monkeypatch.setattr("transformers.set_seed", lambda _seed: None)


def sampler(order):
    def before(monkeypatch):
        from transformers import Trainer

        monkeypatch.setattr(Trainer, "_get_train_sampler", lambda self, *_: order(len(self.train_dataset)))

    return before


def shuffled_by_another_seed(rows):
    import torch

    return torch.randperm(rows, generator=torch.Generator().manual_seed(1)).tolist()


def sgd(monkeypatch):
    import torch
    from transformers import Trainer

    chosen = lambda _args, _model=None: (torch.optim.SGD, {"lr": _args.learning_rate})  # noqa: E731
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(chosen))


def plain_groups(monkeypatch):
    from soup.train.trainer import Resumable

    monkeypatch.delattr(Resumable, "create_optimizer")


def unfused(monkeypatch):
    from transformers import Trainer

    real = Trainer.get_optimizer_cls_and_kwargs

    def chosen(args, model=None):
        kind, given = real(args, model)
        return kind, {key: value for key, value in given.items() if key != "fused"}

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(chosen))


def muon(*ignored, **forced):
    """torch's Muon ignores these arguments, and takes the forced ones."""

    def before(monkeypatch):
        import torch

        real = torch.optim.Muon.__init__

        def deaf(self, params, **given):
            real(self, params, **({k: v for k, v in given.items() if k not in ignored} | forced))

        monkeypatch.setattr(torch.optim.Muon, "__init__", deaf)

    return before


def no_iteration(monkeypatch):
    from torch.optim import _muon

    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", lambda grad, *_: grad / grad.norm())


def matrix_with_adamw(built):
    from soup.effects.optimizer import optimizer

    groups = optimizer(built).param_groups
    groups[-1]["params"].append(groups[0]["params"].pop())


def steps_with(kind, key, value):
    """The optimizer holds what was asked for, and its step takes another number."""

    def before(monkeypatch):
        module, _, name = kind.rpartition(".")
        owner = getattr(__import__(module, fromlist=["x"]), name)
        real = owner.step

        def step(self, *words, **given):
            kept = [group[key] for group in self.param_groups]
            for group in self.param_groups:
                group[key] = value
            try:
                return real(self, *words, **given)
            finally:
                for group, before in zip(self.param_groups, kept, strict=True):
                    group[key] = before

        monkeypatch.setattr(owner, "step", step)

    return before


steps_without_decay = functools.partial(steps_with, key="weight_decay", value=0.0)


def another_gap(monkeypatch):
    from galore_torch import adamw

    real = adamw.GaLoreProjector
    monkeypatch.setattr(
        adamw, "GaLoreProjector", lambda rank, **given: real(rank, **given | {"update_proj_gap": 200})
    )


def another_galore_scale(monkeypatch):
    from galore_torch import adamw

    real = adamw.GaLoreProjector
    monkeypatch.setattr(adamw, "GaLoreProjector", lambda rank, **given: real(rank, **given | {"scale": 1.0}))


def adapter_forward(change):
    """PEFT's layers hold the right numbers, and compute with others."""

    def before(monkeypatch):
        from peft.tuners.lora.layer import Linear

        real = Linear.forward
        monkeypatch.setattr(Linear, "forward", lambda self, x, *_, **__: change(real, self, x))

    return before


def base_alone(_real, layer, x):
    return layer.base_layer(x)


def unscaled(real, layer, x):
    return layer.base_layer(x) + (real(layer, x) - layer.base_layer(x)) / 2


def never_drops(real, layer, x):
    for module in layer.lora_dropout.values():
        module.eval()
    return real(layer, x)


def direction_alone(_real, layer, x):
    return (
        layer.base_layer(x) + layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    )


def rates_at_ten_times(monkeypatch):
    from soup.train import trainer

    real = trainer.create_loraplus_optimizer

    def faster(*given, lr, **settings):
        return real(*given, lr=10 * lr, **settings)

    monkeypatch.setattr(trainer, "create_loraplus_optimizer", faster)


def relative_adafactor(monkeypatch):
    from transformers import Trainer

    real = Trainer.get_optimizer_cls_and_kwargs

    def chosen(args, model=None):
        kind, given = real(args, model)
        return kind, given | {"scale_parameter": True}

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(chosen))


def schedule_of_other_length(monkeypatch):
    from transformers import Trainer

    real = Trainer.create_scheduler

    def longer(self, num_training_steps, optimizer=None):
        return real(self, 2 * num_training_steps, optimizer)

    monkeypatch.setattr(Trainer, "create_scheduler", longer)


def one_forward_of_another_package(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, hidden: hidden * self.weight)


def weights(name, change):
    """Changes a tensor of the model after it was loaded."""

    def after(built):
        import torch

        with torch.no_grad():
            change(next(p for key, p in built.model.named_parameters() if key.endswith(name)))

    return after


def one_element(tensor):
    tensor[7, 7] += 1


def frozen(*parts):
    def after(built):
        found = [p for name, p in built.model.named_parameters() if all(part in name for part in parts)]
        assert found
        for parameter in found:
            parameter.requires_grad_(False)

    return after


def thawed(part):
    def after(built):
        next(p for name, p in built.model.named_parameters() if part in name).requires_grad_(True)

    return after


def unprojected(built):
    from soup.effects.optimizer import optimizer

    groups = optimizer(built).param_groups
    groups[1]["params"] += groups[0]["params"][:1]
    del groups[0]["params"][0]


def trained_base(built):
    next(p for name, p in built.model.named_parameters() if "norm" in name).requires_grad_(True)


def head_adapted(monkeypatch):
    real = __import__("soup.model.load", fromlist=["x"]).LoraConfig

    def config(**given):
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"]
        return real(**given | {"target_modules": names})

    monkeypatch.setattr("soup.model.load.LoraConfig", config)


def optimizer_group(**changed):
    def after(built):
        from soup.effects.optimizer import optimizer

        optimizer(built).param_groups[0].update(changed)

    return after


def spoilt_last_group(**changed):
    def after(built):
        from soup.effects.optimizer import optimizer

        optimizer(built).param_groups[-1].update(changed)

    return after


def optimizer_misses_a_tensor(built):
    from soup.effects.optimizer import optimizer

    optimizer(built).param_groups[0]["params"].pop()


def faster_b(built):
    from soup.effects.optimizer import optimizer

    first = optimizer(built).param_groups[0]
    names = {id(p): name for name, p in built.model.named_parameters()}
    fast = [p for p in first["params"] if "lora_B" in names[id(p)]]
    first["params"] = [p for p in first["params"] if "lora_B" not in names[id(p)]]
    built.trainer.optimizer.add_param_group({**first, "params": fast, "initial_lr": 16 * first["initial_lr"]})
    built.trainer.lr_scheduler.lr_lambdas.append(built.trainer.lr_scheduler.lr_lambdas[0])


def no_decay_groups(built):
    from soup.effects.optimizer import optimizer

    for group in optimizer(built).param_groups:
        group["weight_decay"] = 0.1


def collator(change):
    """The trainer's collator, with its batch changed."""

    def after(built):
        real = built.trainer.data_collator
        built.trainer.data_collator = lambda rows: change(dict(real(rows)))

    return after


def labels_everywhere(batch):
    return batch | {"labels": batch["input_ids"]}


def cut(batch):
    return {key: value[:, :60] for key, value in batch.items()}


def shifted(batch):
    return batch | {"input_ids": batch["input_ids"].roll(1, 1)}


def padding_seen(batch):
    return batch | {"attention_mask": batch["attention_mask"] * 0 + 1}


def rows(change, name="train_dataset"):
    def after(built):
        setattr(built.trainer, name, change(getattr(built.trainer, name)))

    return after


def other_row(dataset):
    changed = [dict(row) for row in dataset]
    changed[3]["labels"] = list(changed[3]["input_ids"])
    return type(dataset).from_list(changed, features=dataset.features)


def rope_scaled(built):
    for module in built.model.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq /= 4


def rope_other_theta(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding as Rotary

    real = Rotary.__init__
    made = []

    def init(self, config, device=None):
        if not made:  # the model's own; whatever is made later for comparison is right
            made.append(self)
            config.rope_parameters["rope_theta"] *= 10
        real(self, config, device)

    monkeypatch.setattr(Rotary, "__init__", init)


def attributes(path, value):
    """Sets an attribute of what was built: `trainer.args.max_grad_norm`."""

    def after(built):
        *owners, name = path.split(".")
        setattr(functools.reduce(getattr, owners, built), name, value)

    return after


def noisy_embedding(built):
    import torch

    def noise(module, _inputs, output):
        return output + torch.rand_like(output) if module.training else output

    built.model.get_input_embeddings().register_forward_hook(noise)


def no_noise(built):
    built.model.get_input_embeddings()._forward_hooks.clear()


def weaker_noise(built):
    from soup.train.neftune import add_noise

    no_noise(built)
    add_noise(built.model, 4.0)


def own_forward(built):
    layer = next(m for m in built.model.modules() if type(m).__name__ == "LlamaMLP")
    layer.forward = types.MethodType(lambda self, hidden: self.down_proj(self.up_proj(hidden)), layer)


def watchdog(built):
    from transformers import TrainerCallback

    built.trainer.add_callback(type("LossWatchdog", (TrainerCallback,), {}))


def unheard_watchdog(built):
    built.trainer.watchdog = None


def deaf_watchdog(built):
    built.trainer.watchdog.patience += 1


def no_watchdog(built):
    built.trainer.remove_callback(built.trainer.watchdog)


def no_flow(built):
    from transformers import DefaultFlowCallback

    real = next(c for c in built.trainer.callback_handler.callbacks if isinstance(c, DefaultFlowCallback))
    real.on_step_end = lambda _args, _state, control, **_: control


def expert_adapters(built):
    import torch

    built.model.experts = torch.nn.ParameterDict({"lora_A": torch.nn.Parameter(torch.zeros(1))})


def remote_class(built):
    type(built.model.get_base_model()).__module__ = "transformers_modules.someone.modeling"


def half_quantized(built):
    import torch

    for module in list(built.model.modules())[: len(list(built.model.modules())) // 2]:
        for name, child in list(module.named_children()):
            if type(child).__name__ == "Linear4bit":
                setattr(module, name, torch.nn.Linear(child.in_features, child.out_features))


def quantized_from_others(built):
    linear = [m for m in built.model.modules() if type(m).__name__ == "Linear4bit"]
    linear[0].weight.data = linear[0].weight.data.roll(1)


def two_processes(_built):
    from accelerate.state import PartialState

    PartialState._shared_state["num_processes"] = 2


GALORE = "optim=galore lora=none optim.galore_rank=8"
NONE = "lora=none"


def one_plain_adapter(built):
    del built.model.get_base_model().model.layers[1].mlp.up_proj.forward


def library_loss(built):
    del built.model.get_base_model().forward


def dense_mask(built):
    built.model.get_base_model().set_attn_implementation("sdpa")


def one_document(batch):
    import torch

    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    return batch


BEFORE = {
    # adapters
    "rank": ("lora.r=4", LORA("r"), "lora.r"),
    "alpha": ("lora.alpha=64", LORA("lora_alpha"), "lora.alpha"),
    "dropout": ("lora.dropout=0.1", LORA("lora_dropout"), "lora.dropout"),
    "modules": ("", LORA("target_modules"), "lora.target_modules"),
    "other modules": (
        "lora.target_modules=[q_proj,v_proj]",
        LORA(target_modules=["q_proj"]),
        "lora.target_modules",
    ),
    "more modules": (
        "lora.target_modules=[q_proj]",
        LORA(target_modules=["q_proj", "v_proj"]),
        "lora.target_modules",
    ),
    "some layers only": (
        "lora.target_modules=[q_proj,v_proj]",
        LORA(layers_to_transform=[0]),
        "lora.target_modules",
    ),
    "some of the modules": (
        "",
        LORA(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
        "lora.target_modules",
    ),
    "embedding too": ("", head_adapted, "lora.target_modules"),
    "dora": ("lora=dora", LORA("use_dora"), "lora.use_dora"),
    "dora unasked": ("", LORA(use_dora=True), "lora.use_dora"),
    "rslora": ("lora=rslora", LORA("use_rslora"), "lora.use_rslora"),
    "rslora unasked": ("", LORA(use_rslora=True), "lora.use_rslora"),
    "another rank for some": ("", LORA(rank_pattern={"q_proj": 2}), "lora.r"),
    "another alpha for some": ("", LORA(alpha_pattern={"q_proj": 1}), "lora.alpha"),
    # optimizer
    "lr": ("optim.lr=1e-3", dropped("learning_rate"), "optim.lr"),
    "weight decay": ("optim.weight_decay=0.1", dropped("weight_decay"), "optim.weight_decay"),
    "AdamW steps with its own epsilon": (
        "optim.eps=1e-6",
        steps_with("torch.optim.AdamW", "eps", 1e-8),
        "optim.eps",
    ),
    "AdamW steps with its own rate": ("", steps_with("torch.optim.AdamW", "lr", 1e-3), "optim.name"),
    "AdamW steps with its own betas": (
        "optim.beta2=0.9",
        steps_with("torch.optim.AdamW", "betas", (0.9, 0.999)),
        "optim.beta2",
    ),
    "LoRA+ with a ratio of its own": (
        "lora=loraplus",
        without("soup.train.trainer", "create_loraplus_optimizer", loraplus_lr_ratio=2.0),
        "lora.loraplus_lr_ratio",
    ),
    "no clipping": (
        "training.max_grad_norm=0.1",
        lambda patch: patch.setattr("transformers.Trainer._clip_grad_norm", lambda *_: 1.0),
        "training.max_grad_norm",
    ),
    "layers that are never recomputed": (
        "training.gradient_checkpointing=true",
        lambda patch: patch.setattr(
            "transformers.PreTrainedModel.gradient_checkpointing_enable", lambda *_, **__: None
        ),
        "training.gradient_checkpointing",
    ),
    "AdamW steps without decay": (
        "optim.weight_decay=0.1",
        steps_without_decay("torch.optim.AdamW"),
        "optim.weight_decay",
    ),
    "Muon steps without decay": (
        "optim=muon optim.weight_decay=0.1",
        steps_without_decay("torch.optim.Muon"),
        "optim.weight_decay",
    ),
    "Adafactor steps without decay": (
        "optim=adafactor optim.weight_decay=0.1",
        steps_without_decay("transformers.optimization.Adafactor"),
        "optim.weight_decay",
    ),
    "schedule-free steps without decay": (
        "optim=schedule_free optim.weight_decay=0.1",
        steps_without_decay("schedulefree.AdamWScheduleFree"),
        "optim.weight_decay",
    ),
    "Lion steps without decay": (
        "optim=lion optim.weight_decay=0.1",
        steps_without_decay("bitsandbytes.optim.Lion"),
        "optim.weight_decay",
    ),
    "8-bit AdamW steps without decay": (
        "optim=adamw_8bit optim.weight_decay=0.1",
        steps_without_decay("bitsandbytes.optim.AdamW"),
        "optim.weight_decay",
    ),
    "GaLore's projector keeps its basis": (
        f"{GALORE} optim.galore_update_proj_gap=5",
        another_gap,
        "optim.galore_update_proj_gap",
    ),
    "GaLore's projector scales otherwise": (GALORE, another_galore_scale, "optim.name"),
    "adapters that compute nothing": ("backend.kernels=stock", adapter_forward(base_alone), "lora.alpha"),
    "adapters at half their scale": (
        "lora=rslora backend.kernels=stock",
        adapter_forward(unscaled),
        "lora.alpha",
    ),
    "dropout that never drops": ("lora.dropout=0.1", adapter_forward(never_drops), "lora.dropout"),
    "DoRA without its magnitude": ("lora=dora", adapter_forward(direction_alone), "lora.use_dora"),
    "beta1": ("optim.beta1=0.8", dropped("adam_beta1"), "optim.beta1"),
    "beta2": ("optim.beta2=0.95", dropped("adam_beta2"), "optim.beta2"),
    "eps": ("optim.eps=1e-6", dropped("adam_epsilon"), "optim.eps"),
    "optimizer": ("", sgd, "optim.name"),
    "AdamW without its fused kernel": ("", unfused, "optim.name"),
    "AdamW for Muon": ("optim=muon", plain_groups, "optim.name"),
    "Muon with the size of another paper": ("optim=muon", muon(adjust_lr_fn="original"), "optim.name"),
    "Muon's momentum": ("optim=muon optim.momentum=0.5", muon("momentum"), "optim.momentum"),
    "Muon's iterations": ("optim=muon optim.ns_steps=3", muon("ns_steps"), "optim.ns_steps"),
    "Muon without a look ahead": ("optim=muon", muon(nesterov=False), "optim.nesterov"),
    "Muon's own iteration": ("optim=muon", no_iteration, "optim.name"),
    "Muon's rate": ("optim=muon", muon("lr"), "optim.lr"),
    "Muon's decay": ("optim=muon optim.weight_decay=0.1", dropped("weight_decay"), "optim.weight_decay"),
    "LoRA+'s groups": ("lora=loraplus", plain_groups, "lora.loraplus_lr_ratio"),
    "LoRA+'s rate of A": ("lora=loraplus", rates_at_ten_times, "optim.lr"),
    "Lion's beta1": ("optim=lion optim.beta1=0.8", dropped("adam_beta1"), "optim.beta1"),
    "Lion's beta2": ("optim=lion optim.beta2=0.9", dropped("adam_beta2"), "optim.beta2"),
    "AdamW for Lion": ("optim=lion", dropped("optim"), "optim.name"),
    "AdamW for Adafactor": ("optim=adafactor", dropped("optim"), "optim.name"),
    "32-bit state": ("optim=adamw_8bit", dropped("optim"), "optim.name"),
    "8-bit AdamW's eps": ("optim=adamw_8bit optim.eps=1e-6", dropped("adam_epsilon"), "optim.eps"),
    "a rate relative to the step": ("optim=adafactor", relative_adafactor, "optim.name"),
    "scheduler": ("", dropped("lr_scheduler_type"), "optim.scheduler"),
    "constant": ("optim.scheduler=constant", dropped("lr_scheduler_type"), "optim.scheduler"),
    "schedule's length": ("training.max_steps=40", schedule_of_other_length, "optim.scheduler"),
    "warm-up": ("optim.warmup_ratio=0.5", dropped("warmup_steps"), "optim.warmup_ratio"),
    # loop
    "max steps": ("", dropped("max_steps"), "training.max_steps"),
    "epochs": ("training.max_steps=null", dropped("num_train_epochs"), "training.epochs"),
    "steps although epochs": (
        "training.max_steps=null",
        without("trl", "SFTConfig", max_steps=9),
        "training.max_steps",
    ),
    "batch": ("", dropped("per_device_train_batch_size"), "training.batch_size"),
    "accumulation": (
        "training.gradient_accumulation_steps=3",
        dropped("gradient_accumulation_steps"),
        "training.gradient_accumulation_steps",
    ),
    "clipping": ("training.max_grad_norm=0.1", dropped("max_grad_norm"), "training.max_grad_norm"),
    "clipping unasked": ("training.max_grad_norm=0", dropped("max_grad_norm"), "training.max_grad_norm"),
    "seed": ("training.seed=7 training.data_seed=1", dropped("seed"), "training.seed"),
    "adapters' seed": ("training.seed=7", no_seed, "training.seed"),
    "seed of the order": ("training.data_seed=7", dropped("data_seed"), "training.data_seed"),
    "order": ("", sampler(range), "training.data_seed"),
    "another order": ("", sampler(shuffled_by_another_seed), "training.data_seed"),
    "checkpoints": ("training.save_steps=2", dropped("save_steps"), "training.save_steps"),
    "checkpoints too often": (
        "training.save_steps=4",
        without("trl", "SFTConfig", save_steps=2),
        "training.save_steps",
    ),
    "no checkpoints": (
        "training.save_steps=2",
        without("trl", "SFTConfig", save_strategy="no"),
        "training.save_steps",
    ),
    "logs": ("training.logging_steps=2", dropped("logging_steps"), "training.logging_steps"),
    "evaluation steps": ("training.eval_steps=2", dropped("eval_steps"), "training.eval_steps"),
    "evaluation": ("training.eval_steps=2", dropped("eval_strategy"), "training.eval_steps"),
    "checkpointing": (
        "training.gradient_checkpointing=true",
        without("trl", "SFTConfig", gradient_checkpointing=False),
        "training.gradient_checkpointing",
    ),
    "checkpointing unasked": (
        "",
        dropped("gradient_checkpointing"),  # TRL's default is on
        "training.gradient_checkpointing",
    ),
    "noise": ("", without("trl", "SFTConfig", neftune_noise_alpha=5.0), "training.neftune_alpha"),
    # data
    "rows prepared again": ("", dropped("dataset_kwargs"), "data.train"),
    "length": ("data.max_length=40", DATA(max_length=512), "data.max_length"),
    "skips what is too long": ("data.max_length=180", DATA(on_too_long="skip"), "data.on_too_long"),
    "truncates what is too long": (
        "data.max_length=180 data.on_too_long=skip",
        DATA(on_too_long="truncate"),
        "data.on_too_long",
    ),
    "fewer samples": ("", DATA(max_samples=20), "data.max_samples"),
    "more samples": ("data.max_samples=20", DATA(max_samples=None), "data.max_samples"),
    "other samples": ("data.max_samples=20", DATA(max_samples=19), "data.max_samples"),
    "other evaluation": ("data.eval_fraction=0.2", DATA(eval_fraction=0.05), "data.eval_fraction"),
    # model
    "dtype": ("model.dtype=bfloat16", LOAD("dtype"), "model.dtype"),
    "dtype, all weights": ("model.dtype=bfloat16 lora=none", LOAD("dtype"), "model.dtype"),
    "autocast": ("model.dtype=bfloat16", without("trl", "SFTConfig", bf16=False), "model.dtype"),
    "autocast unasked": ("model.dtype=float32", dropped("bf16"), "model.dtype"),  # TRL's default is on
    "4bit": ("model.quantization=4bit", LOAD("quantization_config"), "model.quantization"),
    "8bit": ("model.quantization=8bit", LOAD("quantization_config"), "model.quantization"),
    "4bit for 8bit": (
        "model.quantization=8bit",
        without("soup.model.load", "BitsAndBytesConfig", "load_in_8bit", load_in_4bit=True),
        "model.quantization",
    ),
    "fp4": (
        "model.quantization=4bit",
        without("soup.model.load", "BitsAndBytesConfig", "bnb_4bit_quant_type"),
        "model.quantization",
    ),
    "double quantization": (
        "model.quantization=4bit",
        without("soup.model.load", "BitsAndBytesConfig", "bnb_4bit_use_double_quant"),
        "model.quantization",
    ),
    "rotary base": ("", rope_other_theta, "longctx.rope_scaling_type"),
    "kernel": ("", one_forward_of_another_package, "backend.kernels"),
    "kernel, stock": ("backend.kernels=stock", one_forward_of_another_package, "backend.kernels"),
}
AFTER = {
    "one element of the weights": (
        "",
        weights("layers.0.mlp.up_proj.base_layer.weight", one_element),
        "model.base",
    ),
    "one element, all weights": (NONE, weights("layers.1.mlp.down_proj.weight", one_element), "model.base"),
    "4bit of other weights": ("model.quantization=4bit", quantized_from_others, "model.base"),
    "half in 4bit": ("model.quantization=4bit", half_quantized, "model.quantization"),
    "chat template": (
        "",
        attributes("trainer.processing_class.chat_template", "{{ messages[0].content }}"),
        "model.chat_template",
    ),
    "a template unused": (
        "model.chat_template=template.jinja",
        attributes("trainer.processing_class.chat_template", "{{ messages[0].content }}"),
        "model.chat_template",
    ),
    "rotary scaling": ("", rope_scaled, "longctx.rope_scaling_type"),
    "remote code": ("", remote_class, "model.trust_remote_code"),
    "attention": (
        "training.use_flash_attn=off",
        attributes("model.config._attn_implementation", "flash_attention_2"),
        "training.use_flash_attn",
    ),
    "ring attention": (
        "",
        attributes("model.config._attn_implementation", "ring_flash"),
        "longctx.use_ring_attention",
    ),
    "frozen embedding": (NONE, frozen("embed_tokens"), "training.freeze_layers"),
    "frozen layer": (NONE, frozen("layers.0."), "training.freeze_layers"),
    "frozen adapters of a layer": ("", frozen("layers.0.", "lora_"), "training.freeze_layers"),
    "frozen adapters": ("", frozen("lora_A"), "lora.target_modules"),
    "trained norm": ("", trained_base, "lora.target_modules"),
    "a group's rate": ("", optimizer_group(initial_lr=1.0), "optim.lr"),
    "a tensor left out": ("", optimizer_misses_a_tensor, "optim.lr"),
    "faster B": ("", faster_b, "lora.loraplus_lr_ratio"),
    "decay of norms": (NONE, no_decay_groups, "optim.weight_decay"),
    "a group's betas": (NONE, optimizer_group(betas=(0.5, 0.999)), "optim.beta1"),
    "GaLore's scale": (GALORE, optimizer_group(scale=1.0), "optim.galore_scale"),
    "GaLore's rank": (GALORE, optimizer_group(rank=4), "optim.galore_rank"),
    "GaLore without a projection": (GALORE, unprojected, "optim.galore_rank"),
    "a matrix for Muon's AdamW": ("optim=muon lora=none", matrix_with_adamw, "optim.name"),
    "Muon's AdamW's betas": ("optim=muon lora=none", spoilt_last_group(betas=(0.5, 0.9)), "optim.name"),
    "schedule-free, another average": (
        "optim=schedule_free",
        optimizer_group(weight_lr_power=0.0, r=2.0),
        "optim.name",
    ),
    "labels": ("", collator(labels_everywhere), "data.format"),
    "cut batches": ("", collator(cut), "data.format"),
    "shifted ids": ("", collator(shifted), "data.format"),
    "padding seen": ("backend.kernels=stock", collator(padding_seen), "data.format"),
    "labels of one row": ("", rows(other_row), "data.train"),
    "fewer rows": ("", rows(lambda dataset: dataset.select(range(50))), "data.train"),
    "more rows": ("", rows(lambda dataset: dataset.select([*range(len(dataset)), 0])), "data.train"),
    "rows in another order": ("", rows(lambda dataset: dataset.shuffle(seed=0)), "data.train"),
    "no held-out rows": ("", rows(lambda _: None, "eval_dataset"), "data.eval"),
    "other held-out rows": ("", rows(lambda d: d.select(range(3)), "eval_dataset"), "data.eval"),
    "a stream": ("", rows(lambda d: type("IterableDataset", (type(d),), {})(d.data)), "data.streaming"),
    "accelerate accumulates too": (
        "training.gradient_accumulation_steps=2",
        attributes("trainer.accelerator.gradient_accumulation_steps", 4),
        "training.gradient_accumulation_steps",
    ),
    "no flow control": ("training.logging_steps=2", no_flow, "training.logging_steps"),
    "noise where it generates": (
        "training.neftune_alpha=5.0",
        noisy_embedding,
        "training.neftune_alpha",
    ),
    "weaker noise": ("training.neftune_alpha=5.0", weaker_noise, "training.neftune_alpha"),
    "no noise": ("training.neftune_alpha=5.0", no_noise, "training.neftune_alpha"),
    "noise hook": ("", noisy_embedding, "training.neftune_alpha"),
    "liger": ("", attributes("trainer.args.use_liger_kernel", True), "training.use_liger"),
    "own forward": ("", own_forward, "backend.kernels"),
    "an adapter without its kernel": ("", one_plain_adapter, "backend.kernels"),
    "the loss of the library": ("", library_loss, "backend.kernels"),
    "a mask for documents": ("", dense_mask, "backend.kernels"),
    "positions of one document": ("", collator(one_document), "data.format"),
    "packing": ("", attributes("trainer.padding_free", True), "training.packing"),
    "watchdog": ("", watchdog, "training.loss_watchdog"),
    "an unheard watchdog": ("training.loss_watchdog=true", unheard_watchdog, "training.loss_watchdog"),
    "a watchdog's patience": (
        "training.loss_watchdog=true",
        deaf_watchdog,
        "training.loss_watchdog_patience",
    ),
    "a watchdog's threshold": (
        "training.loss_watchdog=true",
        attributes("trainer.watchdog.threshold", 100.0),
        "training.loss_watchdog_threshold",
    ),
    "no watchdog": ("training.loss_watchdog=true", no_watchdog, "training.loss_watchdog"),
    "a layer too many": ("training.freeze_layers=1 lora=none", frozen("layers.1."), "training.freeze_layers"),
    "a frozen layer thawed": (
        "training.freeze_ratio=0.5 lora=none",
        thawed("layers.0."),
        "training.freeze_ratio",
    ),
    "adapters on experts": ("", expert_adapters, "training.moe_lora"),
    "processes": ("", two_processes, "distributed.processes"),
}


@pytest.fixture(autouse=True)
def template_file(tmp_path):
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m.role + m.content }}{% endfor %}")


def overrides_of(words, tmp_path):
    return [word.replace("=template.jinja", f"={tmp_path}/template.jinja") for word in words.split()]


@pytest.mark.parametrize(("words", "before", "key"), BEFORE.values(), ids=BEFORE.keys())
def test_a_library_drops_it(build, wrong, monkeypatch, tmp_path, words, before, key):
    before(monkeypatch)
    assert key in wrong(build(*overrides_of(words, tmp_path)))


@pytest.mark.parametrize(("words", "after", "key"), AFTER.values(), ids=AFTER.keys())
def test_the_build_is_spoilt(build, wrong, monkeypatch, tmp_path, words, after, key):
    built = build(*overrides_of(words, tmp_path))
    if key == "model.trust_remote_code":  # so that it is undone
        monkeypatch.setattr(type(built.model.get_base_model()), "__module__", "to be replaced")
    after(built)
    assert key in wrong(built)


def test_a_key_that_nothing_reads(build, wrong):
    built = build()
    training = dataclasses.replace(built.config.training, effects=())
    built = dataclasses.replace(built, config=dataclasses.replace(built.config, training=training))
    found = wrong(built)
    assert {"training.epochs", "training.seed", "training.save_steps"} <= set(found)
    assert found["training.seed"].how == "no probe reads this key"


def test_what_one_probe_found_wrong_stays_wrong(build, monkeypatch):
    """label_mask speaks about data.format after rows does, and finds nothing."""
    from soup import effects
    from soup.effects import data

    built = build()
    monkeypatch.setattr(
        data, "rows", lambda _: [effects.Effect("data.format", "auto", "none", False, "first")]
    )
    found = {effect.key: effect for effect in effects.prove(built)}
    assert found["data.format"].how == "first"


def test_a_probe_cannot_invent_keys(build, monkeypatch):
    from soup import effects
    from soup.effects import data

    built = build()
    monkeypatch.setattr(data, "rows", lambda _: [effects.Effect("data.nothing", 1, 1, True, "")])
    with pytest.raises(KeyError, match="data.nothing"):
        effects.prove(built)


def test_a_revision_that_is_another_commit(build, wrong):
    built = build()
    tree = {**built.config.tree, "model": {**built.config.tree["model"], "revision": "0123456789" * 4}}
    built = dataclasses.replace(built, config=dataclasses.replace(built.config, tree=tree))
    assert "model.revision" in wrong(built)
