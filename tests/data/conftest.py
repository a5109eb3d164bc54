"""A small real tokenizer, in a folder that transformers' AutoTokenizer loads too."""

import json
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # As GPT-2's: offsets without the spaces around tokens, which soup has to undo.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
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


@pytest.fixture
def arguments(model_folder, tmp_path):
    """The arguments of `prepare`, some of them replaced; rows given as `rows` are written as JSON lines."""

    def given(rows=None, **replaced):
        if rows is not None:
            file = tmp_path / "rows.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            replaced["train"] = str(file)
        return {
            "eval": None,
            "eval_fraction": 0.0,
            "split_seed": 0,
            "format": "auto",
            "shape": "conversation",
            "model_folder": model_folder,
            "chat_template": None,
            "max_length": 512,
            "on_bad_row": "refuse",
            "on_too_long": "truncate",
            "max_samples": None,
            "num_proc": 1,
            "cache": tmp_path / "cache",
        } | replaced

    return given


@pytest.fixture
def encoder(model_folder):
    from soup.data.encode import Encoder

    def given(chat_template=None, max_length=512):
        return Encoder(
            model_folder, chat_template=chat_template, max_length=max_length, on_too_long="truncate"
        )

    return given
