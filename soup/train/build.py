"""From a checked configuration to a trainer ready to take its first step: the one trainer call site."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from soup.data.prepare import Prepared, prepare
from soup.device import Device
from soup.errors import Problem, Refused
from soup.inputs import data_arguments
from soup.kernels import fast
from soup.model import experts, liger, source, unsloth
from soup.model.attention import Choice, asked, attend
from soup.model.freeze import freeze
from soup.model.load import Precision, adapter, load_model, load_tokenizer, precision
from soup.model.qat import fake_quantize, fold_adapters
from soup.model.rope import differing
from soup.rope import Scaling, scaling
from soup.rules.moe import is_balanced, is_moe
from soup.schema import Config, merge_arguments
from soup.train import sharded, streaming
from soup.train.base_loss import base_loss
from soup.train.curriculum import Curriculum, difficulty, split, tokens
from soup.train.neftune import add_noise
from soup.train.trainer import Resumable
from soup.train.watchdog import Watchdog

GRPO = "soup.train.trainers:GRPO"


@dataclass(frozen=True, kw_only=True)
class Built:
    """A trainer before its first step, and what it was built from. Probes read this."""

    config: Config
    device: Device
    model_folder: Path
    prepared: Mapping[str, Prepared]
    precision: Precision
    attention: Choice | None  # `None` where Unsloth chooses
    kernels: tuple[fast.Part, ...] = ()
    tokenizer: Any
    trainer: Any

    @property
    def model(self) -> Any:
        """What the run trains and saves; PPO's trainer holds a value model beside it."""
        return getattr(self.trainer, "policy", self.trainer.model)


def build(
    config: Config,
    *,
    device: Device,
    model_folder: Path,
    output: Path,
    say: Callable[[str], None] = lambda _: None,
) -> Built:
    """Loads everything and constructs the trainer; `output` is where checkpoints go.

    `say` is told of what takes time.

    Raises:
        Refused: the model or the adapter cannot be built as asked.
    """
    from transformers import set_seed

    prepared = prepare(**data_arguments(config, model_folder))
    precise = precision(config.model, config.lora, device)
    tokenizer = load_tokenizer(model_folder, config.model)
    stretched = scaling(config, source.config(model_folder))
    if stretched is not None:  # as saved, it must not cut what the model reaches
        tokenizer.model_max_length = max(tokenizer.model_max_length, stretched.length)
    set_seed(config.training.seed)  # a new head is drawn while loading
    with _named_modules(config):
        model, peft_config = _model(config, model_folder, precise, device, stretched)
        metric_R = _metric(config, prepared["train"], model, model_folder, precise, device, say)
        buckets = None if metric_R is None else split(metric_R, config.training.curriculum_buckets)
        train_rows, buckets = _packed(_dataset(prepared["train"], config), config, buckets)
        extra = _load(f"soup.train.{config.task.extra}") if config.task.extra else lambda *_: {}
        trainer_class, args_class = _load(config.task.trainer), _load(config.task.config)
        set_seed(
            config.training.seed
        )  # adapters are initialised by the trainer, before it sets the seed itself
        settings = {"loraplus_lr_ratio": config.lora.loraplus_lr_ratio}
        settings |= {"galore": config.optim.galore, "muon": config.optim.muon}
        settings |= {"sharding": config.distributed}
        ring: tuple[Any, ...] = ()
        if config.longctx.use_ring_attention:
            ring = (_load("soup.train.ring:Ringed"),)
            settings |= {"ring_size": config.longctx.ring_size, "ring_layout": config.longctx.ring_layout}
        mixed = (*_cut(config), Resumable, *ring, trainer_class)
        trainer = type(trainer_class.__name__, mixed, settings)(
            model=model,
            args=args_class(
                **_router_loss(model, args_class, config)
                | _own_reference(config, model, stretched)
                | _arguments(config, device, precise, prepared, output, is_moe(source.config(model_folder)))
            ),
            train_dataset=train_rows,
            eval_dataset=_dataset(prepared["eval"], config) if "eval" in prepared else None,
            processing_class=tokenizer,
            peft_config=peft_config,
            **extra(config, model_folder, precise, device),
        )
    if buckets is not None:
        trainer.curriculum = Curriculum(buckets, seed=config.training.data_seed, metric_R=metric_R)
    built = Built(
        config=config,
        device=device,
        model_folder=model_folder,
        prepared=prepared,
        precision=precise,
        attention=_attention(config, model_folder, precise, device),
        tokenizer=tokenizer,
        trainer=trainer,
    )
    if config.model.quantization_aware:
        _simulate(built)
    if config.training.neftune_alpha > 0:
        add_noise(built.model, config.training.neftune_alpha)
    if config.training.loss_watchdog:
        _watch(trainer, config)
    if config.training.use_liger:
        liger.put_on(trainer)
    built = _fast(built)
    if config.task.precompute_ref:
        kernels = [str(part) for part in built.kernels]
        trainer.tabulate(built.model.config.to_dict(), str(precise), str(built.attention), kernels)
    return built


def _fast(built: Built) -> Built:
    """The trainer with soup's own kernels, where they apply."""
    choice = built.attention
    parts = fast.put_on(built.trainer, built.model, built.config, choice and choice.implementation)
    if choice is not None and any(part.name == "documents" and part.count for part in parts):
        choice = Choice("soup", f"each document of a row has a call of its own, and {choice.reason}")
    return replace(built, attention=choice, kernels=parts)


def _cut(config: Config) -> tuple[type, ...]:
    """What cuts the model over several processes, beside soup's trainer."""
    kinds = {"fsdp": sharded.FullySharded, "deepspeed": sharded.Zero}
    return (kinds[config.distributed.spread],) if config.distributed.spread in kinds else ()


def _simulate(built: Built) -> None:
    """What the trainer has added to the model and beside it is quantized as the model was when it was loaded."""
    fold_adapters(built.model)
    copy = getattr(built.trainer, "ref_model", None)
    if copy is not None and not any(hasattr(m, "weight_fake_quantizer") for m in copy.modules()):
        fake_quantize(copy, built.config.model)  # GRPO loads its frozen copy itself


def _attention(config: Config, folder: Path, precise: Precision, device: Device) -> Choice | None:
    if config.backend.unsloth:
        return None
    choice = attend(asked(config), folder, config.model, precise, device, config.task.head)
    if "flash" in choice.implementation:
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # read at each call: a resumed run is the same run
    return choice


def _watch(trainer: Any, config: Config) -> None:
    trainer.watchdog = Watchdog(
        threshold=config.training.loss_watchdog_threshold,
        patience=config.training.loss_watchdog_patience,
        given_rows=not config.task.generates,
        rolls_back=config.training.loss_watchdog_action == "rollback",
    )
    trainer.add_callback(trainer.watchdog)


def _model(
    config: Config, folder: Path, precise: Precision, device: Device, stretched: Scaling | None
) -> tuple[Any, Any]:
    """The model, and the adapters that the trainer is to add: none where Unsloth has added them."""
    if config.backend.unsloth:
        return unsloth.load_model(config, folder, precise), None
    training, head = config.training, config.task.head
    model = load_model(
        folder,
        config.model,
        precise,
        device,
        head=head,
        router=training.moe_aux_loss_coeff,
        scaling=stretched,
        attention=asked(config),
    )
    adapters = adapter(config.lora, head, frozen=freeze(model, training))
    return model, experts.place(adapters, model, training)


@contextmanager
def _named_modules(config: Config) -> Iterator[None]:
    """Refuses names that PEFT does not find."""
    try:
        yield
    except ValueError as error:
        if "arget modules" not in str(error) and "target_modules" not in str(error):
            raise
        raise Refused(
            Problem(
                key="lora.target_modules",
                value=config.tree["lora"]["target_modules"],
                why=f"not in this model: {str(error).splitlines()[0]}",
                fix="lora.target_modules=all-linear, or names of its linear layers such as [q_proj,v_proj]",
            )
        ) from error


def _arguments(
    config: Config,
    device: Device,
    precise: Precision,
    prepared: Mapping[str, Prepared],
    output: Path,
    moe: bool,
) -> dict[str, Any]:
    """Arguments of the trainer's configuration: those of the choices, and those of the machine and the run folder."""
    import torch

    arguments = {name: value for name, (value, _) in merge_arguments(config).items()}
    if config.task.max_length is not None:
        arguments[config.task.max_length] = config.data.max_length
    if config.backend.unsloth:
        arguments |= unsloth.arguments(config.task)
    return arguments | {
        "output_dir": str(output),
        "use_cpu": device.kind == "cpu",
        "ddp_timeout": max(1, config.distributed.timeout_s),
        "ddp_broadcast_buffers": False,  # rotary frequencies that follow the length are each process's own
        "ddp_find_unused_parameters": moe,  # experts that no token of a process has passed
        "bf16": precise.autocast is torch.bfloat16,
        "fp16": precise.autocast is torch.float16,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "dataloader_pin_memory": device.kind == "cuda",
        "logging_nan_inf_filter": False,  # a loss that is not a number must be seen
        "eval_strategy": "steps" if "eval" in prepared else "no",
        "per_device_eval_batch_size": math.lcm(config.training.batch_size, config.task.samples),
        "accelerator_config": {
            "dispatch_batches": False
        },  # of a stream, which TRL's ORPO and CPO leave to accelerate
        "report_to": "none",
        "disable_tqdm": True,
    }


def _router_loss(model: Any, args_class: Any, config: Config) -> dict[str, Any]:
    """Has the trainer add the balancing loss of an MoE model with the coefficient that the model was built with.

    TRL's trainers have a coefficient of their own, 0.001, in the place of the model's; those of ORPO and SimPO read
    the model's, and look whether it gives out what the router says. A family of whose loss nothing is known (see
    soup.rules.moe) has none.
    """
    name, text = "router_aux_loss_coef", model.config.get_text_config()
    weight = getattr(text, name, 0.0) if is_balanced(text.to_dict()) else 0.0
    if hasattr(args_class, name):
        return {name: weight}
    if config.task.balances and hasattr(text, "output_router_logits"):
        text.output_router_logits = weight != 0
    return {}


def _own_reference(config: Config, model: Any, stretched: Scaling | None) -> dict[str, Any]:
    """GRPO loads its reference itself, from config.json, which knows nothing of the scaling."""
    if (
        stretched is None
        or config.task.trainer != GRPO
        or not config.task.reference
        or config.lora.r is not None
    ):
        return {}
    return {"model_init_kwargs": differing(model.config.get_text_config())}


def _metric(config: Config, prepared: Prepared, *where: Any) -> Any:
    """How hard each prepared row is, by `training.curriculum_metric`; `None` where there is no curriculum."""
    if not config.training.curriculum:
        return None
    if config.training.curriculum_metric == "loss":
        return base_loss(config, prepared, *where)
    return (difficulty if config.training.by_difficulty else tokens)(prepared.open())


def _dataset(prepared: Prepared, config: Config) -> Any:
    from datasets import Dataset

    if prepared.stream is not None:
        return streaming.dataset(prepared)
    dataset = Dataset.from_file(str(prepared.open()))
    beside = {"difficulty"} if config.training.by_difficulty else set()
    return dataset.remove_columns(sorted(beside & set(dataset.column_names)))


def _packed(dataset: Any, config: Config, buckets: Any) -> tuple[Any, Any]:
    """Rows of up to `data.max_length` tokens, each of whole conversations, or of documents cut where one is full.

    Best fit decreasing (arXiv:2404.10830). The column `seq_lengths` keeps them apart. Documents of each of `buckets`
    have rows of their own; what is returned beside the rows are the buckets' row numbers.
    """
    if not config.training.packing:
        return dataset, buckets
    from datasets import concatenate_datasets
    from trl import pack_dataset

    length, way = config.data.max_length, "bfd_split" if config.task.shape == "text" else "bfd"
    if buckets is None:
        return pack_dataset(dataset, length, way), None
    # In the data's order, since what is packed together (1000 documents) would be of about one length if sorted.
    packed = [pack_dataset(dataset.select(sorted(bucket)), length, way) for bucket in buckets if len(bucket)]
    edges = list(accumulate(map(len, packed), initial=0))
    return concatenate_datasets(packed), [range(start, end) for start, end in pairwise(edges)]


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
