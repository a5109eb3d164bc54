"""Models cut over the processes of a run, by torch's fully_shard or DeepSpeed's ZeRO.

Both are applied here and not by accelerate, which applies neither before the first step nor FSDP on a CPU, where it
would train DDP without a word. The model is built whole in every process, so that every setting is proved on it, and
cut when training begins. A checkpoint has the whole model's weights, and each process's share of the optimizer's state.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from soup.plan.memory import ZERO_BUCKET
from soup.specs import DistributedSpec
from soup.train import ranks

SHARE = "optimizer_{rank}.pt"  # of one process
SCHEDULER = "scheduler.pt"


class Sharded:
    """Mixed in before soup's trainer. `sharding` says what is cut; `begun` is true once it is."""

    sharding: DistributedSpec
    begun = False

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        # What probes made of the whole model is made anew of its shares.
        self.optimizer = self.lr_scheduler = None
        self._created_lr_scheduler = False
        self.accelerator.prepare_model(self.model, evaluation_mode=True)  # autocast, and no DDP around it
        self._cut()
        self.begun = True
        self.create_scheduler(num_training_steps=max_steps, optimizer=self._stepped())
        if resume_from_checkpoint is not None:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return self.model_wrapped, train_dataloader

    def _cut(self) -> None:
        raise NotImplementedError

    def _stepped(self) -> Any:
        """The optimizer whose rates the schedule sets."""
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.begun:
            return super().save_model(output_dir, _internal_call)
        whole = self._whole()
        if self.args.should_save:
            self._save(output_dir, state_dict=whole)
        return None

    def _whole(self) -> dict[str, Any]:
        """The weights that are saved, whole, in the first process; elsewhere none. Tied ones are one tensor."""
        adapted = hasattr(self.model, "peft_config")
        found: dict[str, Any] = {}
        same: dict[int, Any] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if adapted and not tensor.requires_grad:
                continue
            if id(tensor) not in same:
                same[id(tensor)] = self._gathered(tensor)
            if ranks.first():
                found[name] = same[id(tensor)]
        return found

    def _gathered(self, tensor: Any) -> Any:
        raise NotImplementedError

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        os.makedirs(output_dir, exist_ok=True)
        torch.save(self._share(), Path(output_dir) / SHARE.format(rank=ranks.rank()))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        share = Path(checkpoint) / SHARE.format(rank=ranks.rank())
        # The file is this run's own; DeepSpeed's has objects of its classes.
        self._take(torch.load(share, map_location="cpu", weights_only=False))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))

    def _share(self) -> Any:
        raise NotImplementedError

    def _take(self, share: Any) -> None:
        raise NotImplementedError


class FullySharded(Sharded):
    """FSDP2 (arXiv:2304.11277): torch's fully_shard on each layer, and on what is left."""

    def _cut(self) -> None:
        for model in (self.model, getattr(self, "ref_model", None)):
            if model is not None:
                fully_shard(model, self.sharding, self.args.device.type)
        self.create_optimizer()
        self.optimizer = self.accelerator.prepare(self.optimizer)
        self.model_wrapped = self.model

    def _clip_grad_norm(self, model: Any) -> Any:
        return _number(super()._clip_grad_norm(model))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return _number(super()._get_grad_norm(model, grad_norm))

    def _gathered(self, tensor: Any) -> Any:
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return whole.detach().cpu() if ranks.first() else None

    def _share(self) -> Any:
        held = self.optimizer.state_dict()
        state = {
            number: {name: _local(value) for name, value in one.items()}
            for number, one in held["state"].items()
        }
        return held | {"state": state}

    def _take(self, share: Any) -> None:
        from torch.distributed.tensor import DTensor

        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {}
        for number, one in share["state"].items():
            like = order[number]
            state[number] = {
                name: DTensor.from_local(
                    value.to(like.to_local().device),
                    like.device_mesh,
                    like.placements,
                    run_check=False,
                    shape=like.shape,
                    stride=like.stride(),
                )
                if torch.is_tensor(value) and value.shape == like.to_local().shape and value.dim()
                else value
                for name, value in one.items()
            }
        self.optimizer.load_state_dict(share | {"state": state})


def fully_shard(model: Any, spec: DistributedSpec, kind: str) -> None:
    """Cuts the parameters of each layer, and those outside, over all processes.

    Weights that are gathered for a layer's forward pass are given up after it where `spec.shards` names them.
    """
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    from soup.model.freeze import stack

    mesh = init_device_mesh(kind, (ranks.world(),))
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": "weights" in spec.shards}
    if spec.offloads:
        options["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=kind == "cuda")
    for layer in stack(model)[1]:
        fsdp.fully_shard(layer, **options)
    fsdp.fully_shard(model, **options)


def _local(value: Any) -> Any:
    return value.to_local() if hasattr(value, "to_local") else value


def _number(norm: Any) -> Any:
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


class Zero(Sharded):
    """DeepSpeed's ZeRO (arXiv:1910.02054) around the optimizer that the configuration names.

    Weights and products keep their own precision: DeepSpeed's bf16 mode would make the weights 16 bits.
    """

    engine: Any = None

    def _cut(self) -> None:
        import deepspeed

        # A kernel for inference, which DeepSpeed would compile for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.create_optimizer()
        # TRL's loss multiplies by the head's weight without calling the head, and again in its backward pass: where
        # the head is not the embedding, nothing else would gather it.
        base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        head = base.get_output_embeddings()
        if isinstance(getattr(head, "weight", None), torch.nn.Parameter):
            deepspeed.zero.register_external_parameter(base, head.weight)
        self.engine, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=self.optimizer,
            config=zero_settings(self.sharding, self.args),
            dist_init_required=False,
        )
        self.model_wrapped = self.deepspeed = self.engine
        self.optimizer = _Stepped(self.engine)
        self.accelerator.backward = self._backward
        self.accelerator.no_sync = lambda model: nullcontext()  # noqa: ARG005

    def _stepped(self) -> Any:
        return (
            self.engine.basic_optimizer if hasattr(self.engine, "basic_optimizer") else self.engine.optimizer
        )

    def _backward(self, loss: Any, **_: Any) -> None:
        self.engine.set_gradient_accumulation_boundary(self.accelerator.gradient_state.sync_gradients)
        self.engine.backward(loss, scale_wrt_gas=False)

    def _clip_grad_norm(self, model: Any) -> Any:
        """DeepSpeed clips as it steps, and then knows the norm."""
        if not self.begun:
            return super()._clip_grad_norm(model)
        return self._update()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if not self.begun:
            return super()._get_grad_norm(model, grad_norm)
        return self._update() if grad_norm is None else grad_norm

    def _update(self) -> float:
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def _gathered(self, tensor: Any) -> Any:
        import deepspeed

        partitioned = hasattr(tensor, "ds_id")
        with deepspeed.zero.GatheredParameters([tensor]) if partitioned else nullcontext():
            return tensor.detach().cpu().clone() if ranks.first() else None

    def _share(self) -> Any:
        return self.engine.optimizer.state_dict()

    def _take(self, share: Any) -> None:
        states = [share if rank == ranks.rank() else None for rank in range(ranks.world())]
        self.engine.optimizer.load_state_dict(
            states, load_optimizer_states=True, load_from_fp32_weights=False
        )


class _Stepped:
    """What the loop takes for its optimizer: the engine has stepped where the loop clips."""

    def __init__(self, engine: Any):
        self.engine = engine

    @property
    def param_groups(self) -> Any:
        return self.engine.optimizer.param_groups

    def step(self, *_: Any) -> None: ...

    def zero_grad(self, *_: Any, **__: Any) -> None: ...


def zero_settings(spec: DistributedSpec, args: Any) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    on_gpu = args.device.type == "cuda"
    zero: dict[str, Any] = {
        "stage": 3 if "weights" in spec.shards else 2,
        "overlap_comm": on_gpu,
        "reduce_bucket_size": ZERO_BUCKET,
        "allgather_bucket_size": ZERO_BUCKET,
        "stage3_max_live_parameters": ZERO_BUCKET,
        "stage3_max_reuse_distance": 0,  # what was gathered is given up after use
        "stage3_param_persistence_threshold": 0,  # no weight stays whole in each process
    }
    if "optimizer" in spec.offloads:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_clipping": float(args.max_grad_norm),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 2**31,
    }
