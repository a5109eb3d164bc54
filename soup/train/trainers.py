"""TRL's trainers on rows that soup has tokenised: its own preparation is not run a second time.

TRL 1.12's ORPO and CPO cut an answer that is too long to the wrong length (`tokenize_row` subtracts the answer's
length, not the prompt's), and differ from DPO in the tokens of one and the same pair.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import RepeatSampler

from soup.train.forward import as_prepared
from soup.train.streaming import streams

MASKED = -100


class _Table:
    """The table of reference log-probabilities, as training would compute them.

    TRL makes it in its constructor, before accelerate has prepared the model, and keeps it by rows and weights alone.
    Here it waits for `tabulate`, when the model is as it trains.
    """

    made_by: tuple[Any, ...] | None = None

    def tabulate(self, *made_by: Any) -> None:
        """Makes the table, or takes the one that was made the same way; `made_by` is what it depends on beside rows
        and weights."""
        self.made_by = made_by
        rows = {"train": self.args.per_device_train_batch_size, "eval": self.args.per_device_eval_batch_size}
        for name, batch_size in rows.items():
            if (dataset := getattr(self, f"{name}_dataset")) is not None:
                setattr(self, f"{name}_dataset", self._precompute_ref_logps(dataset, name, batch_size))

    def _precompute_ref_logps(self, dataset: Any, *given: Any) -> Any:
        if self.made_by is None:
            return dataset
        own = dataset.remove_columns([], new_fingerprint=Hasher.hash((dataset._fingerprint, self.made_by)))
        with as_prepared(self.model, self.accelerator):
            return super()._precompute_ref_logps(own, *given)


class DPO(_Table, DPOTrainer):
    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class KTO(_Table, KTOTrainer):
    """Batches are taken in order, since each answer's mismatched partner is of its own batch (arXiv:2402.01306,
    section 4.1). So the rows are shuffled here, once, by the data seed."""

    def _prepare_dataset(self, dataset: Any, _: Any, args: Any, dataset_name: str) -> Any:
        if dataset_name == "train" and not streams(dataset):  # a stream is shuffled as it is read
            generator = torch.Generator().manual_seed(args.data_seed)
            dataset = dataset.select(torch.randperm(len(dataset), generator=generator).tolist())
        return dataset.map(
            lambda batch: {"KL_completion_ids": batch["completion_ids"][-1:] + batch["completion_ids"][:-1]},
            batched=True,
            batch_size=args.per_device_train_batch_size,
        )


class Reward(RewardTrainer):
    """Scores are read at the token that ends the answer, where PPO reads them; what a template writes after it goes."""

    def __init__(self, **given: Any):
        super().__init__(**given)
        if not (self.args.bf16 or self.args.fp16):
            # Beside quantized weights TRL makes all that trains bfloat16. Adapters convert what they are given; the
            # head takes the float32 that the model gives it.
            for name, parameter in self.model.named_parameters():
                if ".score." in f".{name}" and parameter.requires_grad:
                    parameter.data = parameter.data.float()

    def _prepare_dataset(self, dataset: Any, processing_class: Any, *_: Any) -> Any:
        end = processing_class.eos_token_id

        def whole(row: dict[str, Any]) -> dict[str, Any]:
            answers = {name: row[name] for name in ("chosen_ids", "rejected_ids")}
            kept = {
                name: len(ids) - ids[::-1].index(end) if end in ids else len(ids)
                for name, ids in answers.items()
            }
            return {name: row["prompt_ids"] + ids[: kept[name]] for name, ids in answers.items()}

        return dataset.map(whole)


class _Rows:
    """What ORPO's and CPO's collator takes: prompt and answer in one sequence, the prompt masked.

    TRL 1.12 builds both of a data set that has rows by number only, so a stream takes the place of its first row.
    """

    def __init__(self, *, train_dataset: Any, eval_dataset: Any = None, **rest: Any):
        rows = _tokens(train_dataset)
        stands_in = Dataset.from_list([next(iter(rows))]) if streams(rows) else rows
        super().__init__(train_dataset=stands_in, eval_dataset=_tokens(eval_dataset), **rest)
        if streams(rows):
            self.train_dataset = rows.map(self.tokenize_row)

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:  # noqa: ARG002
        prompt_T = feature["prompt_ids"]
        row: dict[str, Any] = {"prompt_input_ids": prompt_T, "prompt_attention_mask": [1] * len(prompt_T)}
        for side in ("chosen", "rejected"):
            answer_T = feature[f"{side}_ids"]
            row[f"{side}_input_ids"] = prompt_T + answer_T
            row[f"{side}_attention_mask"] = [1] * len(prompt_T + answer_T)
            row[f"{side}_labels"] = [MASKED] * len(prompt_T) + answer_T
        return row


def _tokens(dataset: Any) -> Any:
    """Without the texts, to which the trainers would apply the chat template."""
    texts = (
        [name for name in dataset.column_names if not name.endswith("_ids")] if dataset is not None else []
    )
    return dataset.remove_columns(texts) if texts else dataset


class ORPO(_Rows, ORPOTrainer):
    pass


class CPO(_Rows, CPOTrainer):
    pass


class Groups(RepeatSampler):
    """Each prompt as often as it is answered. Every epoch has an order of its own, which a resume finds again."""

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


class GRPO(GRPOTrainer):
    """TRL draws the order of prompts from `seed`; here it comes from `data_seed`, as in every other task."""

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        theirs = super()._get_train_sampler(dataset)
        return Groups(
            theirs.data_source,
            mini_repeat_count=theirs.mini_repeat_count,
            batch_size=theirs.batch_size,
            repeat_count=theirs.repeat_count,
            seed=self.args.data_seed,
        )
