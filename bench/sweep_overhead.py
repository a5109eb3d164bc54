"""What a sweep saves: eight short runs as one sweep, against the same eight as processes of their own.

    .venv/bin/python bench/sweep_overhead.py [--quick]

Each run is a model of 0.1 million parameters for four steps, so that starting is nearly all there is; one run at a
time, on all cores. Prints the wall time of both and their ratio, and how long a point takes from its start to its
end within the sweep. Status 1 where a point takes more than LIMIT_S. `--quick`: three runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

LIMIT_S = 1.5
CHECKOUT = Path(__file__).resolve().parents[1]
MODEL = """
import sys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
trainer = trainers.BpeTrainer(
    vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
)
tokenizer.train_from_iterator(["a lamp is lit"], trainer)
fast = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
    chat_template="{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
)
fast.save_pretrained(sys.argv[1])
LlamaForCausalLM(LlamaConfig(
    vocab_size=len(fast), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)).save_pretrained(sys.argv[1])
"""


def main() -> int:
    count = 3 if "--quick" in sys.argv[1:] else 8
    seeds = [str(seed) for seed in range(count)]
    with TemporaryDirectory() as folder:
        model = f"{folder}/model"
        subprocess.run([sys.executable, "-c", MODEL, model], check=True, stderr=subprocess.DEVNULL)
        words = [
            "model=hub",
            f"model.base={model}",
            "data.max_length=128",
            "training.max_steps=4",
            "training.batch_size=4",
            "launch.device=cpu",
        ]
        # Both find tokenised data in the cache: it is made here.
        _soup("training.seed=99", f"run.root={folder}/warm", *words)
        begin = time.perf_counter()
        for seed in seeds:
            _soup(f"training.seed={seed}", f"run.root={folder}/alone", *words)
        alone = time.perf_counter() - begin
        begin = time.perf_counter()
        out = _soup("--multirun", f"training.seed={','.join(seeds)}", f"run.root={folder}/sweep", *words)
        sweep = time.perf_counter() - begin
        assert f"{count} new" in out and "did not finish" not in out, out
        taken = _points(Path(folder) / "sweep")
    print(f"{count} processes {alone:6.1f} s, {alone / count:5.2f} s each")
    print(f"one sweep   {sweep:6.1f} s, {sweep / count:5.2f} s each; {alone / sweep:.1f} times as fast")
    print(f"a point of the sweep, from its start to its end: {median(taken):.2f} s (limit {LIMIT_S} s)")
    return int(median(taken) > LIMIT_S)


def _points(root: Path) -> list[float]:
    """Seconds between the ends of one point and the next: fork, build, four steps, evaluation, saving."""
    ends = sorted(path.stat().st_mtime for path in root.glob("*/result.json"))
    return [later - earlier for earlier, later in zip(ends, ends[1:], strict=False)]


def _soup(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "soup", *words],
        cwd=CHECKOUT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
