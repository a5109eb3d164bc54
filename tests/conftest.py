"""What every test may use: a real model too small to wait for, configurations as Hydra composes them, and runs.

No test reaches a hub, and none touches the user's cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = (
    "The lamp is lit and the keeper writes his log.",
    "How do I boil an egg so that the yolk stays soft?",
    "Count six and a half minutes, then cold water, quick.",
    "def add(a, b):\n    return a + b\n",
    "Grüße aus Köln: 東京の天気は晴れです 🙂",
)
VOCABULARY = 600
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory) -> Path:
    """SOUP_CACHE of this process and of those it starts."""
    from soup import cache

    folder = tmp_path_factory.mktemp("soup-cache")
    models = cache.root() / "models"  # converting the embedded model takes half a minute; `make setup` has
    if models.is_dir():
        (folder / "models").symlink_to(models)
    before = os.environ.get("SOUP_CACHE")
    os.environ["SOUP_CACHE"] = str(folder)
    yield folder
    del os.environ["SOUP_CACHE"]
    if before is not None:
        os.environ["SOUP_CACHE"] = before


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A small real tokenizer with a ChatML template, in a folder that transformers' AutoTokenizer loads too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # As GPT-2's: offsets without the spaces around tokens, which soup has to undo.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES, "        " * 8] * 4, trainer)
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True, "normalized": False},
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny_model(model_folder, tmp_path_factory) -> Path:
    """That tokenizer and a random Llama of 2 layers and 0.1 million parameters: loads and trains in no time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        )
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    shutil.copytree(model_folder, folder)
    model.save_pretrained(folder)
    return folder


EXPERTS = {
    "mixtral": {
        "num_local_experts": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "router_aux_loss_coef": 0.02,
    },
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 16},
    "olmoe": {"num_experts": 4, "num_key_value_heads": 2},
    "deepseek_v3": {  # latent attention, a dense layer below, a shared expert
        "n_routed_experts": 4,
        "moe_intermediate_size": 32,
        "num_key_value_heads": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
}


@pytest.fixture(scope="session")
def expert_model(model_folder, tmp_path_factory) -> Callable[..., Path]:
    """`expert_model("mixtral")`: that tokenizer and a random mixture of 4 experts, 2 for each token, in 2 layers."""
    made: dict[str, Path] = {}

    def folder(kind: str, **settings: Any) -> Path:
        name = "-".join([kind, *map(str, settings.values())])
        if name not in made:
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM

            common = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96}
            common |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_experts_per_tok": 2}
            common |= {
                "max_position_embeddings": 512,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
            }
            with torch.random.fork_rng():
                torch.manual_seed(0)
                config = AutoConfig.for_model(kind, **common | EXPERTS.get(kind, {}) | settings)
                model = AutoModelForCausalLM.from_config(config)
            made[name] = tmp_path_factory.mktemp("experts") / kind
            shutil.copytree(model_folder, made[name])
            model.save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="session")
def scorer(tiny_model, tmp_path_factory) -> Path:
    """A random reward model, as task=reward saves one with all its weights."""
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("scorer")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def compose() -> Callable[..., dict[str, Any]]:
    """`compose("lora=dora", "optim.lr=1e-3")`: the resolved tree, as `python -m soup` composes it."""

    def composed(*overrides: str) -> dict[str, Any]:
        from soup.cli.compose import drive
        from soup.cli.main import parse

        return drive(parse(list(overrides)), lambda points: points[0].tree)

    return composed


@pytest.fixture(scope="session")
def tree(compose, tiny_model) -> Callable[..., dict[str, Any]]:
    """The same for the tiny model, short rows and few steps: 0.1 s each on one core."""

    def composed(*overrides: str) -> dict[str, Any]:
        return compose(
            "model=hub",
            f"model.base={tiny_model}",
            "data.max_length=128",
            "data.num_proc=1",
            "training.batch_size=4",
            "training.max_steps=4",
            "launch.device=cpu",
            *overrides,
        )

    return composed


@pytest.fixture
def one_process():
    """What a process keeps, put back: accelerate's precision, threads, generators. soup has one run in a process."""
    import torch
    from accelerate.state import AcceleratorState, PartialState

    state, before, threads = torch.get_rng_state(), dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def build(tree, tmp_path, one_process) -> Callable[..., Any]:  # noqa: ARG001
    """`build("lora.r=4")`: what the training process holds before its first step, in this process."""

    def built(*overrides: str) -> Any:
        from soup import device, schema
        from soup.model import source
        from soup.train.build import build

        config = schema.check(tree(*overrides))
        return build(
            config,
            device=device.resolve("cpu"),
            model_folder=source.folder(config.model),
            output=tmp_path / "checkpoints",
        )

    return built


@pytest.fixture
def place(tmp_path, place_below) -> Callable[..., Any]:
    """`place(tree, "a")`: the run folder below tmp_path/a with all that the training process reads."""
    return lambda tree, root="runs": place_below(tmp_path / root, tree)


@pytest.fixture(scope="session")
def place_below() -> Callable[..., Any]:
    """`place_below(root, tree)`: the same anywhere, for what outlives a test."""

    def placed(root: Path, tree: dict[str, Any]) -> Any:
        from soup import inputs, record, schema
        from soup.model import source

        config = schema.check(tree)
        content = inputs.content(config, source.folder(config.model))
        run = record.place(root, record.run_id(tree, content), tree, resume="auto")
        record.write_json(run.folder / "inputs.json", content)
        if not run.environment.exists():
            record.write_json(run.environment, record.environment() | {"threads": 1})
        return run

    return placed


@pytest.fixture(scope="module")
def start() -> Callable[..., subprocess.Popen[str]]:
    """Starts the training process of a run, one thread; what still runs at the end of the module is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(
        run: Any, *words: str, python: tuple[str, ...] = ("-m", "soup.train"), **environment: str
    ) -> Any:
        process = subprocess.Popen(
            [sys.executable, *python, *words, str(run.folder)],
            env=os.environ | ONE_THREAD | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture(scope="module")
def train(start) -> Callable[..., tuple[int, str]]:
    """Trains a run to its end: exit status, and what the terminal showed."""

    def to_its_end(run: Any, *words: str, **options: Any) -> tuple[int, str]:
        process = start(run, *words, **options)
        shown, _ = process.communicate(timeout=300)
        return process.returncode, shown

    return to_its_end


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """`until(process, condition)` waits for the condition while the process lives, and fails if it ends before."""

    def wait(
        process: subprocess.Popen[str],
        condition: Callable[[], Any],
        timeout_s: float = 120,
        every_s: float = 0.02,
    ) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            if process.poll() is not None:
                pytest.fail(f"the process ended with {process.returncode} before: {process.stdout.read()}")
            if time.monotonic() > end:
                process.kill()
                pytest.fail(f"nothing happened in {timeout_s} s")
            time.sleep(every_s)

    return wait


@pytest.fixture(scope="session")
def forkserver() -> Any:
    """A multiprocessing context whose processes come from a server that has imported what training imports."""
    import multiprocessing

    from tests import ring_worker

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(ring_worker.PRELOAD)
    return context


@pytest.fixture(scope="session")
def together(forkserver) -> Callable[..., list[Any]]:
    """`together("train", 2, tree=..., folder=...)`: what each of two processes of one run gives back."""
    from tests import ring_worker

    def run(function: str, size: int, **given: Any) -> list[Any]:
        port, started = ring_worker.free_port(), []
        for rank in range(size):
            ours, theirs = forkserver.Pipe()
            arguments = (function, rank, size, port, theirs, given)
            process = forkserver.Process(target=ring_worker.answer, args=arguments, daemon=True)
            process.start()
            started.append((ours, process))
        found = []
        for ours, process in started:
            assert ours.poll(120), "no answer"
            right, answer = ours.recv()
            assert right, answer
            found.append(answer)
            process.join(10)
        return found

    return run
