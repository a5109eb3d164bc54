"""What single tasks need beside the arguments that all of TRL's trainers share. Specs name these functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from soup import rewards
from soup.device import Device
from soup.model import source
from soup.model.attention import attend
from soup.model.load import Precision, load_model
from soup.rope import changed, scaling
from soup.schema import Config


def reference(config: Config, folder: Path, precise: Precision, device: Device) -> dict[str, Any]:
    """A frozen copy of the model, where there is neither an adapter to switch off nor a table of log-probabilities."""
    if config.lora.r is not None or config.task.precompute_ref:
        return {}
    return {"ref_model": _frozen_copy(config, folder, precise, device)}


def _frozen_copy(config: Config, folder: Path, precise: Precision, device: Device) -> Any:
    stretched, asked = scaling(config, source.config(folder)), config.training.use_flash_attn
    return load_model(folder, config.model, precise, device, scaling=stretched, attention=asked)


def reward_functions(config: Config, *_: Any) -> dict[str, Any]:
    return {"reward_funcs": rewards.load(config.task.rewards)}


def ppo_models(config: Config, folder: Path, precise: Precision, device: Device) -> dict[str, Any]:
    """PPO's other models: what scores answers, what predicts the score, and a frozen copy where no adapter is.

    The value model trains in all its weights, so it is float32, as the policy is where all of its weights train.

    Raises:
        Refused: a folder that holds no model with one score, or one for another vocabulary.
    """
    import torch
    from transformers import AutoConfig

    task, trust = config.tree["task"], config.model.trust_remote_code
    asked = config.training.use_flash_attn
    own = AutoConfig.from_pretrained(folder, trust_remote_code=trust).get_text_config().vocab_size
    value = "value_model" if task["value_model"] is not None else "reward_model"
    with (
        torch.random.fork_rng()
    ):  # a head is drawn before it is read; adapters are drawn from the seed after this
        reward_model, value_model = (
            _scorer(
                f"task.{name}",
                task[name],
                own,
                dtype,
                trust,
                attention=lambda base: (
                    attend(asked, base, config.model, precise, device, "score").implementation
                ),
            )
            for name, dtype in (("reward_model", precise.weights), (value, torch.float32))
        )
    reference = None if config.lora.r is not None else _frozen_copy(config, folder, precise, device)
    for frozen in (reward_model, reference):
        if frozen is not None:
            frozen.requires_grad_(False)
    return {"reward_model": reward_model, "value_model": value_model, "ref_model": reference}


def _scorer(
    key: str, value: str, vocabulary: int, dtype: Any, trust: bool, *, attention: Callable[[Path], str]
) -> Any:
    """The sequence classifier with one label in the folder `value`; an adapter there is folded into its base."""
    from peft import PeftConfig, PeftModel
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from soup.errors import Problem, Refused
    from soup.model.rope import forget

    def refused(why: str, fix: str = "FOLDER, the `model` folder of a run of task=reward") -> Refused:
        return Refused(Problem(key=key, value=value, why=why, fix=f"{key}={fix}"))

    def described(folder: Path) -> bool:
        return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))

    folder = Path(value).expanduser()
    if not described(folder):
        if described(folder / "model"):
            raise refused("is a run, not its model", str(folder / "model"))
        raise refused("is no model folder" if folder.is_dir() else "there is no such folder")
    try:
        adapter = None
        if (folder / "adapter_config.json").is_file():
            adapter = PeftConfig.from_pretrained(folder)
        base = folder if adapter is None else adapter.base_model_name_or_path
        settings = AutoConfig.from_pretrained(base, trust_remote_code=trust)
        kinds = (settings.architectures or [""]) if adapter is None else [adapter.task_type]
        if not all(kind.endswith(("ForSequenceClassification", "SEQ_CLS")) for kind in kinds):
            raise refused("holds no sequence classifier, which gives an answer a score")
        if adapter is None and settings.num_labels != 1:
            raise refused(f"classifies into {settings.num_labels}, and a score is one number")
        found = settings.get_text_config().vocab_size
        if found != vocabulary:
            raise refused(f"has a vocabulary of {found}, and the policy's has {vocabulary}")
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            base,
            num_labels=1,
            dtype=dtype,
            trust_remote_code=trust,
            output_loading_info=True,
            **changed(folder),
            attn_implementation=attention(Path(base)),
        )
        forget(model)
        missing = {
            name for name in loaded["missing_keys"] if adapter is None or not name.startswith("score.")
        }
        if missing:
            raise refused(f"has no weights for {len(missing)} of its tensors, {min(missing)} among them")
        if not hasattr(model, "score"):
            raise refused(f"is a {type(model).__name__}, whose head is not the `score` that TRL's PPO reads")
        if adapter is None:
            return model
        return PeftModel.from_pretrained(model, folder).merge_and_unload()
    except KeyError as error:  # as PEFT says it of a head that is not there
        raise refused(f"has no weights for {error.args[0]}") from error
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise refused(f"cannot be loaded: {str(error).strip().splitlines()[0]}") from error
