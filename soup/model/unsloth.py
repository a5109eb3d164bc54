"""`backend=unsloth`: the process that it patches, and the model as it loads it. Its imports are in the functions."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from soup import cache
from soup.device import Device
from soup.errors import Problem, Refused
from soup.schema import Config
from soup.specs import TaskSpec

if TYPE_CHECKING:
    from soup.model.load import Precision

PATCHED = ("transformers", "trl", "peft")


def take_over(device: Device) -> None:
    """Imports Unsloth, which patches libraries for the whole process: before anything else imports them.

    What Unsloth reads from its environment is set to what the configuration says, or to nothing where it has no key.

    Raises:
        Refused: this version of Unsloth does not run here.
        RuntimeError: one of the libraries is imported already.
    """
    if "unsloth" in sys.modules:
        return  # by the process that this one was forked from
    if early := [name for name in PATCHED if name in sys.modules]:
        raise RuntimeError(f"{', '.join(early)} imported before unsloth, which patches them")
    for name in [name for name in os.environ if name.startswith("UNSLOTH_CPU_")]:
        del os.environ[name]
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"  # it would ask the hub for a file
    os.environ["UNSLOTH_DISABLE_AUTO_PADDING_FREE"] = "1"  # training.packing decides
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache.root() / "unsloth"))  # not the working folder
    if device.kind == "cpu":
        os.environ["UNSLOTH_FORCE_CPU"] = "1"  # beside a GPU too
        os.environ["UNSLOTH_CPU_BF16"] = (
            "1"  # `precision` decides; Unsloth would turn it off where it is slow
        )
    try:
        import unsloth  # noqa: F401
    except NotImplementedError as error:  # versions before 2026.10.8, without a GPU
        raise Refused(
            Problem(
                key="backend",
                value="unsloth",
                why=str(error).strip().splitlines()[0],
                fix="pip install --no-deps 'unsloth>=2026.10.8' 'unsloth_zoo>=2026.10.8', or backend=transformers",
            )
        ) from error


def load_model(config: Config, folder: Path, precise: Precision) -> Any:
    """The model as Unsloth loads it, quantized if asked, with its adapters.

    Raises:
        Refused: the folder holds no such model, or not all of its weights.
    """
    from unsloth import FastLanguageModel

    from soup.model.freeze import freeze
    from soup.model.load import adapter, complete, readable

    head, training = config.task.head, config.training
    checkpointing = training.gradient_checkpointing
    with readable(config.model, head), _loading() as loaded:
        model, _ = FastLanguageModel.from_pretrained(
            str(folder),
            max_seq_length=config.data.max_length,
            dtype=precise.weights,
            load_in_4bit=config.model.quantization == "4bit",
            load_in_8bit=config.model.quantization == "8bit",
            full_finetuning=config.lora.r is None,
            use_gradient_checkpointing=checkpointing,
            random_state=training.seed,
            trust_remote_code=config.model.trust_remote_code,
            use_exact_model_name=True,
            **({"num_labels": 1} if head == "score" else {}),
        )
    complete(config.model, loaded["missing_keys"])
    lora = adapter(config.lora, head, frozen=freeze(model, training))
    if lora is None:
        return model
    modules = lora.target_modules
    return FastLanguageModel.get_peft_model(
        model,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=modules if isinstance(modules, str) else sorted(modules),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        exclude_modules=lora.exclude_modules,
        use_gradient_checkpointing=checkpointing,
        random_state=training.seed,
    )


def arguments(task: TaskSpec) -> dict[str, Any]:
    """Arguments of the trainer's configuration without which Unsloth's own code would not run.

    TRL's default for SFT, the same loss, takes the model's forward away from it. Unsloth sets this itself on a GPU.
    """
    return {"loss_type": "nll"} if task.config == "trl:SFTConfig" else {}


@contextmanager
def _loading() -> Iterator[dict[str, Any]]:
    """What transformers reports of a load; Unsloth asks for the model alone, and drops it."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    report: dict[str, Any] = {"missing_keys": []}

    def reporting(load: Any) -> Any:
        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            model, found = load(*args, **kwargs | {"output_loading_info": True})
            report.update(found)
            return model

        return from_pretrained

    with ExitStack() as stack:
        for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification):
            stack.enter_context(patch.object(kind, "from_pretrained", reporting(kind.from_pretrained)))
        yield report
