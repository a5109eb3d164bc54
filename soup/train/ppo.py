"""TRL 1.12's PPO trainer, resumable to the bit, clipped, and on soup's rows. Its loop is TRL's, untouched.

What TRL's loop does not do is done at the places where it calls out: the loader that it takes prompts from, the
callbacks that it runs, the optimizer that it steps and the `log` that it reports to. TRL 1.13 has no PPO any more.
"""

from __future__ import annotations

import functools
import gc
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_model, save_model
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import GenerationConfig, PrinterCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.experimental.ppo import PPOTrainer
from trl.experimental.ppo.ppo_trainer import OnlineTrainerState

from soup.errors import Problem, Refused
from soup.model.load import prompt_ids

VALUE = "value_model.safetensors"


class PPO(PPOTrainer):
    """PPO (Ziegler et al. 2019, arXiv:1909.08593) on rows with a `prompt`, text or messages.

    A step is an update: `batch_size * gradient_accumulation_steps` prompts are answered, and the answers are passed
    over `num_ppo_epochs` times, with an optimizer step each. Gradients are clipped by one norm over policy and value
    model, as the optimizer steps them. `args.max_steps` counts updates; an epoch drops its last, smaller batch.

    Raises:
        Refused: fewer rows than an update takes, or no token to pad with.
    """

    # What Trainer.__init__ sets, which PPOTrainer does not call, and Trainer's and soup's methods read.
    is_fsdp_xla_enabled = is_fsdp_xla_v1_enabled = is_fsdp_xla_v2_enabled = False
    neftune_noise_alpha: float | None = None
    _tr_loss = torch.zeros(())
    _total_loss_scalar = 0.0
    _globalstep_last_logged = 0

    def __init__(
        self,
        *,
        model: Any,
        args: Any,
        train_dataset: Any,
        processing_class: Any,
        reward_model: Any,
        value_model: Any,
        ref_model: Any = None,
        **others: Any,
    ):
        # TRL asks accelerate for no precision; the first Accelerator of a process decides for all.
        world = Accelerator(mixed_precision=args.mixed_precision).num_processes
        per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
        per_epoch = len(train_dataset) // per_update
        if per_epoch == 0:
            raise Refused(
                Problem(
                    key="training.batch_size",
                    value=args.per_device_train_batch_size,
                    why=f"an update takes {per_update} prompts, and there are {len(train_dataset)}",
                    fix="a smaller training.batch_size or training.gradient_accumulation_steps, or more rows",
                )
            )
        updates = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
        args.total_episodes = updates * per_update
        args.num_sample_generations = 0  # prints tables
        args.stop_token = "eos"

        tokenizer = deepcopy(processing_class)
        ids = [prompt_ids(tokenizer, row["prompt"]) for row in train_dataset]
        tokenizer.pad_token = _padding(tokenizer, ids, model.config.get_text_config().vocab_size)
        self._pad = tokenizer.pad_token_id
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}  # since the last log

        # `generate` fills what TRL leaves open from here, and log-probabilities would be those of a repetition
        # penalty, say, that the update knows nothing of. The model is saved with its own.
        self._generation = model.generation_config
        model.generation_config = GenerationConfig(pad_token_id=self._pad)
        if args.gradient_checkpointing:  # which Trainer.train does, and TRL's does not
            for one in (model, value_model):
                one.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset.add_column("input_ids", ids),
            processing_class=tokenizer,
            data_collator=self._padded,
            reward_model=reward_model,
            value_model=value_model,
            ref_model=ref_model,
            **others,
        )
        self.remove_callback(PrinterCallback)
        self.accelerator.print = lambda *_: None  # one line that says nothing
        self.updates, self.per_epoch = updates, per_epoch
        self.order = Order(
            rows=len(train_dataset),
            take=per_update,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            rank=self.accelerator.process_index,
            world=world,
        )
        # Not prepared by accelerate: at the end of a loader that it knows it stops accumulating gradients, and
        # TRL's updates lie between two batches. A generator of its own, or each epoch would draw from torch's.
        self.dataloader = DataLoader(
            self.train_dataset, batch_sampler=self.order, collate_fn=self._padded, generator=torch.Generator()
        )
        self._autocast(model)
        if ref_model is not None:
            self._autocast(ref_model)
        for scorer in (value_model, reward_model):
            self._autocast(getattr(scorer, scorer.base_model_prefix))
            self._autocast(scorer.score)
        getattr(reward_model, reward_model.base_model_prefix).register_forward_pre_hook(
            self._count, with_kwargs=True
        )
        getattr(self.optimizer, "optimizer", self.optimizer).register_step_pre_hook(self._clip)

    @property
    def policy(self) -> Any:
        """The model that is trained for its own sake; `self.model` holds the value model beside it."""
        return self.policy_model

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[int, ...]:  # noqa: ARG002
        """Trainer's numbers: epochs, updates an epoch, rows, rows in all, rows an update, batches, updates."""
        epochs = math.ceil(self.updates / self.per_epoch)
        take = self.order.take
        rows = self.order.rows
        return epochs, self.per_epoch, rows, self.updates * take, take, self.per_epoch, self.updates

    def train(self, resume_from_checkpoint: str | Path | None = None) -> None:
        """TRL's loop, from the checkpoint's update on where one is given, to the end or to where it is asked to stop.

        The loop draws nothing before its first batch, so that the generators (numpy's too, which shuffles the
        minibatches) may be restored before it begins. It counts from 1 to `args.num_total_batches`, and uses that
        number and its count for nothing but the state, which `_Place` puts right.
        """
        done = 0
        if resume_from_checkpoint is not None:
            self._restore(Path(resume_from_checkpoint))
            done = self.state.global_step
        self.order.given = done
        place = _Place(self, done)
        self.callback_handler.callbacks.insert(0, place)
        self.args.num_total_batches = self.updates - done
        gc.freeze()  # TRL collects garbage twice an update: 0.6 s, if it looks through all that libraries hold
        try:
            with suppress(_Stopped):
                super().train()
                return
            self.state.episode -= self.args.batch_size  # of the update that did not begin
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        finally:
            gc.unfreeze()
            self.args.num_total_batches = self.updates
            self.callback_handler.callbacks.remove(place)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Means since the last log, every `logging_steps` updates and at the last; TRL calls this at every one.

        `loss` is what was descended, `grad_norm` the norm before clipping.
        """
        logs = {name: value for name, value in logs.items() if name != "eps"}  # episodes per second
        logs["loss"] = logs["loss/policy_avg"] + self.args.vf_coef * logs["loss/value_avg"]
        last = {"learning_rate": logs.pop("lr"), "episode": logs.pop("episode")}
        if math.isnan(logs["val/ratio_var"]):  # of a single number
            del logs["val/ratio_var"]
        since = self._metrics["train"]
        for name, value in logs.items():
            since[name].append(value)
        step = self.state.global_step
        self.state.epoch = step / self.per_epoch  # TRL's leaves out that the last batch is dropped
        if step % self.args.logging_steps == 0 or step == self.updates:
            means = {name: sum(values) / len(values) for name, values in since.items()}
            since.clear()
            super().log(means | last, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The policy alone, with the generation settings that it came with."""
        base = self.policy.get_base_model() if self.is_peft_model else self.policy
        trained_with, base.generation_config = base.generation_config, self._generation
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            base.generation_config = trained_with

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        save_model(self.value_model, str(folder / VALUE))

    def _restore(self, checkpoint: Path) -> None:
        whole, self.model = self.model, self.policy  # as save_model saved it
        try:
            self._load_from_checkpoint(str(checkpoint))
        finally:
            self.model = whole
        load_model(self.value_model, str(checkpoint / VALUE), device=str(self.args.device))
        self._load_optimizer_and_scheduler(str(checkpoint))
        self._load_scaler(str(checkpoint))
        self.state = OnlineTrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self._load_rng_state(str(checkpoint))

    def _padded(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Prompts, padded on the left: input_ids_BT. Where the run is asked to stop, the loop is left here."""
        if self.control.should_training_stop:
            raise _Stopped
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        return {"input_ids": pad_sequence(ids, True, self._pad, padding_side="left")}

    def _autocast(self, module: Any) -> None:
        """Runs the module in the precision asked for, and its logits come as float32.

        accelerate does so with the model that it prepares, so in the update; here also while answers are drawn and
        scored, or the ratio of new to old probabilities would not start at 1.
        """
        forward = module.forward

        @functools.wraps(forward)
        def cast(*args: Any, **kwargs: Any) -> Any:
            with self.accelerator.autocast():
                output = forward(*args, **kwargs)
            if isinstance(output, torch.Tensor):
                return output.float()
            if getattr(output, "logits", None) is not None:
                output.logits = output.logits.float()
            return output

        module.forward = cast

    def _count(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        """The reward model sees each prompt with its answer once, up to the answer's end."""
        self.state.num_input_tokens_seen += int(kwargs["attention_mask"].sum())

    def _clip(self, *_: Any) -> None:
        """Before each step that the optimizer takes, which is once per accumulated batch."""
        self._metrics["train"]["grad_norm"].append(self._clip_grad_norm(self.model).item())

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        """torch's own, since accelerate's would unscale float16's gradients, as the scaler has done by then."""
        return torch.nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm or math.inf)


class Order:
    """Row numbers of each update: epoch e has the permutation drawn from `seed + e`, without what is left over.

    One pass is what is left of an epoch; `given` counts the updates that rows were handed out for, so that a loader
    which passes over it again and again goes on where it stopped, and a resumed one where its checkpoint was.
    """

    def __init__(self, *, rows: int, take: int, seed: int, rank: int = 0, world: int = 1):
        self.rows, self.take, self.seed, self.rank, self.world = rows, take, seed, rank, world
        self.given = 0

    def __len__(self) -> int:
        return self.rows // self.take

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first = divmod(self.given, len(self))
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
        share = self.take // self.world
        for update in range(first, len(self)):
            self.given += 1
            start = update * self.take + self.rank * share
            yield order[start : start + share]


class _Stopped(Exception):
    """TRL's loop looks at no wish to stop; its next batch raises this."""


class _Place(TrainerCallback):
    """First of the callbacks, so that all others see the run's own numbers, not those of what is left of it."""

    def __init__(self, trainer: PPO, done: int):
        self.trainer, self.done = trainer, done

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        state.max_steps = self.trainer.updates
        state.global_step = self.done
        state.episode = self.done * args.batch_size
        state.num_train_epochs = math.ceil(self.trainer.updates / self.trainer.per_epoch)


def _padding(tokenizer: Any, prompts: list[list[int]], vocabulary: int) -> str:
    """A special token that neither ends an answer nor stands in a prompt: TRL takes it for nothing, wherever it is.

    With the end of text for padding, as many models have it, TRL would mask it in every turn of the prompt, and
    never learn the one that ends the answer.
    """
    used = {tokenizer.eos_token_id}.union(*prompts)
    for token in dict.fromkeys([tokenizer.pad_token, *tokenizer.all_special_tokens, *_added(tokenizer)]):
        number = tokenizer.convert_tokens_to_ids(token)
        if number is not None and number < vocabulary and number not in used:
            return token
    raise Refused(
        Problem(
            key="model.base",
            why="all special tokens of its tokenizer end answers or stand in prompts, so none can be padding",
            fix="a tokenizer with a pad_token of its own, within the model's vocabulary",
        )
    )


def _added(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
