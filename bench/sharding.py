"""Predicted against measured bytes of each process, for each way to spread a run over 1, 2 and 4 processes.

    .venv/bin/python bench/sharding.py [--processes 1 2 4] [--only WORD]

A random Llama of 30 million parameters, all of whose weights train in float32, takes two steps under torchrun's agent.
Each process counts what it holds, tensor by tensor: weights when the forward pass ends, averaged gradients before the
update, and the optimizer's state (with ZeRO's float32 copies); and it reads its peak resident memory. Predicted are the
same parts of `soup plan`, and its peak. Status 1 where a prediction is more than LIMIT off.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

LIMIT = 0.1
WAYS = ("ddp", "zero2", "zero3", "zero2_offload", "fsdp_full_shard", "fsdp_shard_grad", "fsdp_full_offload")
PARTS = ("weights", "gradients", "optimizer", "peak")
SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}


def worker(folder: Path) -> None:
    """One process: trains the run in `folder`, and writes down what it holds."""
    from transformers import TrainerCallback

    from soup.record import Run
    from soup.schema import check
    from soup.train import ranks
    from soup.train.job import prepare_run
    from soup.train.memory import peak_memory_bytes

    run = Run(folder)
    built = prepare_run(run, check(run.tree()))
    built.trainer.metrics_file = run.metrics
    held: dict[str, float] = {}

    class Count(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            held["gradients"] = size(p.grad for p in built.trainer.model.parameters()) or held.get(
                "gradients", 0
            )

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            built.trainer.model.register_forward_hook(
                lambda *_: held.update(weights=weights(built.trainer.model))
            )

        def on_step_end(self, *_: Any, **__: Any) -> None:
            held["optimizer"] = size(state(built.trainer))

    built.trainer.add_callback(Count())
    if hasattr(built.trainer, "_update"):  # DeepSpeed's gradients are gone when it has stepped
        real = built.trainer._update

        def step() -> float:
            optimizer = built.trainer.engine.optimizer
            kept = [
                g for part in optimizer.averaged_gradients.values() if part for g in part if g is not None
            ]
            if not kept:
                kept = [p.grad for p in optimizer.single_partition_of_fp32_groups]
            held["gradients"] = size(kept)
            return real()

        built.trainer._update = step
    built.trainer.train()
    held["peak"] = peak_memory_bytes()
    (folder / f"held.{ranks.rank()}.json").write_text(json.dumps(held))
    ranks.leave()


def size(tensors: Any) -> int:
    """Bytes of this process's parts."""
    total = 0
    for tensor in tensors:
        if tensor is not None:
            here = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            total += here.numel() * here.element_size()
            if hasattr(tensor, "ds_tensor"):
                total += tensor.ds_tensor.numel() * tensor.ds_tensor.element_size()
    return total


def weights(model: Any) -> int:
    """Bytes of the weights when the forward pass ends: FSDP2 may keep what it has gathered, beside its shares."""
    groups = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if hasattr(m, "_get_fsdp_state")]
    shares = size(one.sharded_param for group in groups if group for one in group.fsdp_params)
    here = size(model.parameters())
    return here + shares if here > shares > 0 else here


def state(trainer: Any) -> list[Any]:
    """The optimizer's state, and the copies that ZeRO steps."""
    import torch

    optimizer = getattr(trainer, "engine", None) and trainer.engine.optimizer
    if not optimizer:
        return [t for one in trainer.optimizer.state.values() for t in one.values() if torch.is_tensor(t)]
    copies = (
        getattr(optimizer, "fp32_partitioned_groups_flat", None) or optimizer.single_partition_of_fp32_groups
    )
    inner = [t for one in optimizer.optimizer.state.values() for t in one.values() if torch.is_tensor(t)]
    return [*copies, *inner]


def model(folder: Path) -> Path:
    """A random Llama with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=4096, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, **SIZES)
    ).save_pretrained(folder)
    return folder


def measure(words: list[str], processes: int, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The plan's parts and each process's, in bytes."""
    from soup.cli.compose import drive
    from soup.cli.main import parse
    from soup.record import place, write_json

    def placed(points: Any) -> Any:
        from soup import inputs
        from soup.cli.check import valid

        (one,) = valid(points, train=True)
        run = place(
            folder, f"{one.config.tree['distributed']['name']}-{processes}", one.config.tree, resume="never"
        )
        write_json(run.folder / "inputs.json", inputs.content(one.config, one.model_folder))
        return run, one.plan.to_dict()["memory"]

    run, planned = drive(parse(words), placed)
    planned["peak"] = sum(planned.values())
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = torchrun if processes > 1 else []
    start = ["-m", *command] if command else []
    environment = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(
        [sys.executable, *start, __file__, "--worker", str(run.folder)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"{words}: {done.stderr[-3000:]}")
    return planned, [json.loads(path.read_text()) for path in sorted(run.folder.glob("held.*.json"))]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", type=Path)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return 0
    worst = 0.0
    with TemporaryDirectory() as temporary:
        base = model(Path(temporary) / "model")
        words = ["model=hub", f"model.base={base}", "task=pretrain", "lora=none", "model.dtype=float32"]
        words += ["launch.device=cpu", "data.max_length=64", "training.max_steps=2", "training.batch_size=2"]
        print(f"{'MB a process':>28}" + "".join(f"{part:>24}" for part in PARTS))
        for way in WAYS:
            for processes in args.processes:
                if args.only not in way:
                    continue
                chosen = [f"distributed={way}", f"distributed.processes={processes}"] if processes > 1 else []
                if processes == 1 and way != WAYS[0] and not args.only:
                    continue  # one process has nobody to share with: distributed=none
                planned, held = measure([*words, *chosen], processes, Path(temporary) / "runs")
                line = f"{way if processes > 1 else 'none':>22} x {processes:<3}"
                for part in PARTS:
                    most = max(one[part] for one in held)
                    beside = {"optimizer": "float32 copies"}
                    if way == "zero3":  # FSDP2 has given them up when the forward pass ends
                        beside["weights"] = "gathered"
                    told = planned[part] + planned.get(beside.get(part, ""), 0)
                    worst = max(worst, abs(told / most - 1))
                    line += f"{told / 1e6:>12.2f} {most / 1e6:>11.2f}"
                print(line, flush=True)
    print(f"predicted, then measured; the worst is {worst:.1%} off")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
