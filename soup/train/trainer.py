"""What TRL's trainers lack to be resumable to the bit: whole-or-absent checkpoints, and the state between logs."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors import SafetensorError
from torch.utils.data import Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from soup.errors import RecordError
from soup.record import write_json
from soup.train import ranks
from soup.train.optimizers import galore, muon
from soup.train.streaming import streams

KEPT = 2  # checkpoints; one more than the newest, should that be unreadable
STATE = "soup_state.json"
PARTIAL = ".partial"
MASKS = ("attention_mask", "chosen_attention_mask", "rejected_attention_mask")
SUMS = ("_metrics", "_stored_metrics")  # of TRL's trainers: mode to metric to values since the last log


class Resumable:
    """Mixed in before a `transformers.Trainer`. `metrics_file` is set by whoever builds the trainer.

    `galore`: its rank, update_proj_gap and scale, where it is the optimizer; `muon`: its momentum, nesterov and
    ns_steps. `watchdog`: is told each micro-step's loss. `rate_factor`: of the learning rate, for steps from here on.
    `loraplus_lr_ratio`: LoRA+'s rate of B over that of A (arXiv:2402.12354), `None` where they are equal.
    """

    metrics_file: Path
    loraplus_lr_ratio: float | None = None
    galore: Mapping[str, Any] | None = None
    muon: Mapping[str, Any] | None = None
    watchdog: Any = None
    rate_factor: float = 1.0
    curriculum: Sampler[int] | None = None  # set by whoever builds the trainer, where one is asked for
    eval_collator: Any = None  # where training has one of its own (soup.kernels.fast)
    _partial: Path | None = None

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        kept = self.data_collator
        self.data_collator = self.eval_collator or kept
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = kept

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return self.curriculum or super()._get_train_sampler(*args, **kwargs)

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """A stream is one epoch without end: of sys.maxsize of them, a resume at the last step would begin another."""
        epochs, *rest = super().set_initial_training_values(*args, **kwargs)
        return (1 if streams(self.train_dataset) else epochs, *rest)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._partial) if self._partial is not None else super()._get_output_dir(trial)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Counts tokens that are not padding, those of both sides of a pair too; GRPO counts what it generates."""
        if isinstance(inputs, dict):
            masks = [mask for name, mask in inputs.items() if name in MASKS]
            counted = sum(int(mask.sum()) for mask in masks)
            # A packed batch has no padding, so it has no mask.
            self.state.num_input_tokens_seen += ranks.total(counted if masks else inputs["input_ids"].numel())
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.watchdog is not None:
            self.watchdog.saw(loss)
        return loss

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        by_tokens = named.get("num_items_in_batch") is not None and self.model_accepts_loss_kwargs
        with self._balanced() if by_tokens else nullcontext():
            return super().compute_loss(model, inputs, *rest, **named)

    @contextmanager
    def _balanced(self) -> Iterator[None]:
        """Within, the balancing loss of an MoE model is its part of a step's mean over batches and processes.

        transformers divides the loss of tokens by those of the whole step, adds the balancing loss of each batch in
        full, and multiplies both by the number of processes.
        """
        # Outside the loop there is one.
        micro_steps = getattr(self, "current_gradient_accumulation_steps", 1)
        parts = ranks.world() * (micro_steps if self.model.training else 1)
        base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        name = "router_aux_loss_coef"
        kept = [(one, getattr(one, name, None)) for one in (base, base.config.get_text_config())]
        kept = [(one, weight) for one, weight in kept if weight is not None]
        try:
            for one, weight in kept:
                setattr(one, name, weight / parts)
            yield
        finally:
            for one, weight in kept:
                setattr(one, name, weight)

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is not None:
            return self.optimizer
        if self.galore is not None:
            self.optimizer = galore(self, self.galore)
        elif self.muon is not None:
            self.optimizer = muon(self, self.muon)
        elif self.loraplus_lr_ratio is not None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = create_loraplus_optimizer(
                self.model,
                kind,
                loraplus_lr_ratio=self.loraplus_lr_ratio,
                loraplus_weight_decay=self.args.weight_decay,
                **settings,
            )
        else:
            super().create_optimizer(model)
        for group in self.optimizer.param_groups:
            if (
                "warmup_steps" in group
            ):  # schedule-free: the schedule warms up, and it would read our share as steps
                group["warmup_steps"] = 0
        return self.optimizer

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL writes one at each checkpoint; soup writes its own, once, with the configuration."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes under a hidden name, flushes, renames: a checkpoint is complete or invisible."""
        folder = Path(self.args.output_dir)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._partial = folder / PARTIAL
        if ranks.first():
            shutil.rmtree(self._partial, ignore_errors=True)
        ranks.barrier()
        whole = self._partial / name
        try:
            super()._save_checkpoint(model, trial)
            kept = self._between_logs()
            ranks.barrier()
            if not ranks.first():
                ranks.barrier()
                return
            write_json(whole / STATE, kept)
            _flush(whole)
            if self.metrics_file.exists():
                _flush_file(self.metrics_file)  # a resume cuts it to the length that is written here
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(whole, folder / name)
            _flush_folder(folder)
            ranks.barrier()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch says RuntimeError of a full disk
            free = shutil.disk_usage(folder).free // 2**20
            reason = str(error).strip().splitlines()[0]
            raise RecordError(f"{folder / name} cannot be written ({free} MiB are free): {reason}") from error
        finally:
            if ranks.first():
                shutil.rmtree(self._partial, ignore_errors=True)
            self._partial = None
        steps = sorted(
            folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.rpartition("-")[2])
        )
        for old in steps[:-KEPT]:
            hidden = old.with_name(f".{old.name}")
            os.replace(old, hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Reads adapters into the parameters that are there.

        PEFT would cast those of 16 bits (TRL's, beside quantized weights) to float32, in new parameters: an optimizer
        that was made before holds the old ones.
        """
        adapted = hasattr(self.model, "peft_config")
        if adapted:
            self.model.load_adapter = partial(self.model.load_adapter, autocast_adapter_dtype=False)
        try:
            super()._load_from_checkpoint(*args, **kwargs)
        finally:
            if adapted:
                del self.model.load_adapter

    def _between_logs(self) -> dict[str, Any]:
        """What transformers and TRL sum up between two logs, and where metrics.jsonl stands."""
        return {
            "loss_sums": ranks.gather(self._tr_loss.item()),
            "loss_total": self._total_loss_scalar,
            "last_logged_step": self._globalstep_last_logged,
            "metrics": {
                name: {mode: dict(values) for mode, values in getattr(self, name, {}).items()}
                for name in SUMS
            },
            "train_tokens": getattr(self, "_total_train_tokens", None),
            "rate_factor": self.rate_factor,
            "watchdog": self.watchdog and self.watchdog.to_dict(),
            "metrics_bytes": self.metrics_file.stat().st_size if self.metrics_file.exists() else 0,
        }

    def restore_between_logs(self, checkpoint: Path) -> None:
        """The inverse, called once training has begun (transformers resets these just before)."""
        state = json.loads((checkpoint / STATE).read_text())
        self._tr_loss = torch.tensor(state["loss_sums"][ranks.rank()], device=self.args.device)
        self._total_loss_scalar = state["loss_total"]
        self._globalstep_last_logged = state["last_logged_step"]
        for name, modes in state["metrics"].items():
            for mode, values in modes.items():
                getattr(self, name)[mode] = defaultdict(list, values)
        if state["train_tokens"] is not None:
            self._total_train_tokens = state["train_tokens"]
        if self.watchdog is not None:
            self.watchdog.restore(state["watchdog"])
        if self.rate_factor != state["rate_factor"]:
            self._scale_rates(self.rate_factor / state["rate_factor"])

    def _scale_rates(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
            group["initial_lr"] *= factor
        self.lr_scheduler.base_lrs = [rate * factor for rate in self.lr_scheduler.base_lrs]
        self.lr_scheduler._last_lr = [rate * factor for rate in self.lr_scheduler._last_lr]


def cut_metrics(metrics: Path, checkpoint: Path | None) -> None:
    """Takes away the lines of metrics.jsonl that were written after the checkpoint (all of them without one)."""
    if metrics.exists():
        size = 0 if checkpoint is None else json.loads((checkpoint / STATE).read_text())["metrics_bytes"]
        os.truncate(metrics, size)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            _flush_file(path)
    _flush_folder(folder)


def _flush_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
