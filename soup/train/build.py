"""From a checked configuration to a trainer ready to take its first step: the one trainer call site."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soup.data.prepare import Prepared, prepare
from soup.device import Device
from soup.errors import Problem, Refused
from soup.inputs import data_arguments
from soup.model import unsloth
from soup.model.freeze import freeze
from soup.model.load import Precision, adapter, load_model, load_tokenizer, precision
from soup.schema import Config, merge_arguments
from soup.train import streaming
from soup.train.curriculum import Curriculum, tokens
from soup.train.neftune import add_noise
from soup.train.trainer import Resumable
from soup.train.watchdog import Watchdog


@dataclass(frozen=True, kw_only=True)
class Built:
    """A trainer before its first step, and what it was built from. Probes read this."""

    config: Config
    device: Device
    model_folder: Path
    prepared: Mapping[str, Prepared]
    precision: Precision
    tokenizer: Any
    trainer: Any

    @property
    def model(self) -> Any:
        """What the run trains and saves; PPO's trainer holds a value model beside it."""
        return getattr(self.trainer, "policy", self.trainer.model)


def build(config: Config, *, device: Device, model_folder: Path, output: Path) -> Built:
    """Loads everything and constructs the trainer; `output` is where checkpoints go.

    Raises:
        Refused: the model or the adapter cannot be built as asked.
    """
    from transformers import set_seed

    prepared = prepare(**data_arguments(config, model_folder))
    precise = precision(config.model, config.lora, device)
    tokenizer = load_tokenizer(model_folder, config.model)
    set_seed(config.training.seed)  # a new head is drawn while loading
    with _named_modules(config):
        model, peft_config = _model(config, model_folder, precise, device)
        extra = _load(f"soup.train.{config.task.extra}") if config.task.extra else lambda *_: {}
        trainer_class, args_class = _load(config.task.trainer), _load(config.task.config)
        set_seed(
            config.training.seed
        )  # adapters are initialised by the trainer, before it sets the seed itself
        settings = {"loraplus_lr_ratio": config.lora.loraplus_lr_ratio, "galore": config.optim.galore}
        trainer = type(trainer_class.__name__, (Resumable, trainer_class), settings)(
            model=model,
            args=args_class(
                **_own_router_loss(model, args_class) | _arguments(config, device, precise, prepared, output)
            ),
            train_dataset=_packed(_dataset(prepared["train"]), config),
            eval_dataset=_dataset(prepared["eval"]) if "eval" in prepared else None,
            processing_class=tokenizer,
            peft_config=peft_config,
            **extra(config, model_folder, precise, device),
        )
    if config.training.curriculum:
        trainer.curriculum = Curriculum(
            tokens(prepared["train"].open()),
            buckets=config.training.curriculum_buckets,
            seed=config.training.data_seed,
        )
    built = Built(
        config=config,
        device=device,
        model_folder=model_folder,
        prepared=prepared,
        precision=precise,
        tokenizer=tokenizer,
        trainer=trainer,
    )
    if config.training.neftune_alpha > 0:
        add_noise(built.model, config.training.neftune_alpha)
    if config.training.loss_watchdog:
        _watch(trainer, config)
    return built


def _watch(trainer: Any, config: Config) -> None:
    trainer.watchdog = Watchdog(
        threshold=config.training.loss_watchdog_threshold,
        patience=config.training.loss_watchdog_patience,
        given_rows=not config.task.generates,
        rolls_back=config.training.loss_watchdog_action == "rollback",
    )
    trainer.add_callback(trainer.watchdog)


def _model(config: Config, folder: Path, precise: Precision, device: Device) -> tuple[Any, Any]:
    """The model, and the adapters that the trainer is to add: none where Unsloth has added them."""
    if config.backend.unsloth:
        return unsloth.load_model(config, folder, precise), None
    model = load_model(folder, config.model, precise, device, head=config.task.head)
    return model, adapter(config.lora, config.task.head, frozen=freeze(model, config.training))


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
    config: Config, device: Device, precise: Precision, prepared: Mapping[str, Prepared], output: Path
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


def _own_router_loss(model: Any, args_class: Any) -> dict[str, Any]:
    """TRL would replace the weight that an MoE model's config.json gives its balancing loss by its own, 0.001."""
    name = "router_aux_loss_coef"
    own = getattr(model.config.get_text_config(), name, None)
    return {name: own} if own is not None and hasattr(args_class, name) else {}


def _dataset(prepared: Prepared) -> Any:
    from datasets import Dataset

    if prepared.stream is not None:
        return streaming.dataset(prepared)
    return Dataset.from_file(str(prepared.open()))


def _packed(dataset: Any, config: Config) -> Any:
    """Rows of up to `data.max_length` tokens, each of whole conversations, or of documents cut where one is full.

    Best fit decreasing (arXiv:2404.10830). The column `seq_lengths` keeps them apart.
    """
    if not config.training.packing:
        return dataset
    from trl import pack_dataset

    return pack_dataset(
        dataset, config.data.max_length, "bfd_split" if config.task.shape == "text" else "bfd"
    )


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
