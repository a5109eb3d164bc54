"""Tokens and masks, equal to those of transformers and TRL."""

import types
from importlib.util import find_spec
from pathlib import Path

import pytest

from soup.data.encode import MASKED, Encoder
from soup.data.rows import BadRow
from soup.data.template import Template, training_variant
from soup.errors import Refused

BLOCKS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>\n' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Drops what earlier turns thought, as Qwen3's does: the rendering of a turn changes once another follows.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALKS = [
    [("user", "Hi"), ("assistant", "Ho")],
    [
        ("system", "Be brief."),
        ("user", "An egg?"),
        ("assistant", "Six minutes."),
        ("user", "Thanks"),
        ("assistant", "Welcome."),
    ],
    [("user", "Grüße 🙂🙂"), ("assistant", "東京の天気 🙂"), ("user", "é\r\n\t"), ("assistant", "🙂")],
    [("user", "code"), ("assistant", "def add(a, b):\n        return  a + b\n   "), ("user", "<|im_end|>")],
    [("user", "a"), ("assistant", "b"), ("assistant", "c")],
    [("user", "x" * 1000), ("assistant", "y" + " y" * 400)],
]


def talk(turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


@pytest.mark.parametrize("turns", TALKS)
def test_generation_blocks_give_transformers_tokens_and_mask(encoder, tokenizer, turns):
    expected = tokenizer.apply_chat_template(
        talk(turns), chat_template=BLOCKS, return_dict=True, return_assistant_tokens_mask=True
    )
    got = encoder(BLOCKS, 10_000).encode("conversation", {"messages": talk(turns)})
    assert got.columns["input_ids"].tolist() == expected["input_ids"]
    mask = [int(label != MASKED) for label in got.columns["labels"]]
    assert mask == expected["assistant_masks"]
    assert got.learnt == sum(mask) > 0


@pytest.mark.parametrize("turns", TALKS)
def test_without_blocks_the_same_characters_are_learnt(encoder, turns):
    """Where a system turn is given, the model's template and BLOCKS write the same text: the same masks."""
    turns = turns if turns[0][0] == "system" else [("system", "You help."), *turns]
    plain = encoder(None, 10_000).encode("conversation", {"messages": talk(turns)}).columns
    marked = encoder(BLOCKS, 10_000).encode("conversation", {"messages": talk(turns)}).columns
    assert plain["input_ids"].tolist() == marked["input_ids"].tolist()
    assert plain["labels"].tolist() == marked["labels"].tolist()


def test_what_is_learnt_is_the_answer_and_its_end(encoder, tokenizer):
    got = encoder().encode("conversation", {"messages": talk([*TALKS[2], ("user", "more")])}).columns
    learnt = [token for token, label in zip(got["input_ids"], got["labels"], strict=True) if label != MASKED]
    assert tokenizer.decode(learnt) == "東京の天気 🙂<|im_end|>\n🙂<|im_end|>\n"
    assert all(label in (MASKED, token) for token, label in zip(got["input_ids"], got["labels"], strict=True))


def test_tokens_of_spaces_alone_are_learnt(encoder, tokenizer):
    """This tokenizer reports them as covering nothing; transformers loses a turn that starts with one."""
    answer = " a\n" + " " * 16 + "\n b"
    got = (
        encoder().encode("conversation", {"messages": talk([("user", "Hi"), ("assistant", answer)])}).columns
    )
    learnt = [token for token, label in zip(got["input_ids"], got["labels"], strict=True) if label != MASKED]
    assert tokenizer.decode(learnt) == answer + "<|im_end|>\n"


@pytest.mark.parametrize("name", ["qwen3", "llama3", "qwen2_5", "gemma", "phi3"])
def test_templates_that_trl_knows_learn_what_trl_learns(encoder, tokenizer, name):
    folder = Path(find_spec("trl").origin).parent / "chat_templates"
    source = (folder / f"{name}.jinja").read_text()
    variant = (folder / f"{name}_training.jinja").read_text()
    assert training_variant(source) == variant
    messages = talk([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d e")])
    expected = tokenizer.apply_chat_template(
        messages, chat_template=variant, return_dict=True, return_assistant_tokens_mask=True
    )
    got = encoder(source).encode("conversation", {"messages": messages}).columns
    assert got["input_ids"].tolist() == expected["input_ids"]
    assert [int(label != MASKED) for label in got["labels"]] == expected["assistant_masks"]


TEMPLATES = (
    None,
    BLOCKS,
    FORGETFUL,
    "{{ bos_token }}{{ messages | tojson(indent=2) }}{{ eos_token }}{{ tools }}",
    "{%- for m in messages -%}\n  {% if loop.index > 2 %}{% break %}{% endif %}\n  {{ m.content | trim }}\n"
    "{% endfor %}\n",
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_rendering_equals_transformers(encoder, tokenizer, template):
    for turns in TALKS:
        for generation_prompt in (False, True):
            expected = tokenizer.apply_chat_template(
                talk(turns), chat_template=template, add_generation_prompt=generation_prompt, tokenize=False
            )
            assert (
                encoder(template).template.render(talk(turns), generation_prompt=generation_prompt)
                == expected
            )


def test_a_template_that_rewrites_earlier_turns_is_a_bad_row_with_the_way_out():
    template = Template(FORGETFUL, {})
    thinking = talk([("user", "a"), ("assistant", "hm</think>b"), ("user", "c"), ("assistant", "d")])
    with pytest.raises(BadRow) as bad:
        template.spans(thinking)
    assert "turn 2" in bad.value.why and "{% generation %}" in bad.value.fix
    text, spans = template.spans(talk([("user", "a"), ("assistant", "b")]))
    assert [text[start:end] for start, end in spans] == ["b<|im_end|>\n"]


@pytest.mark.parametrize(
    ("source", "messages", "why"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            [("user", "a"), ("assistant", "b")],
            "roles must alternate",
        ),
        ("{{ messages[5].content }}", [("user", "a"), ("assistant", "b")], "no element 5"),
        ("{{ messages[0].content + 3 }}", [("user", "a"), ("assistant", "b")], "refuses the conversation"),
        ("{{ messages.append(1) }}", [("user", "a"), ("assistant", "b")], "refuses the conversation"),
        ("{{ messages[0].content }}", [("assistant", "a")], "starts with an assistant turn"),
        (None, [("assistant", "a")], "turn 1 cannot be told"),
    ],
)
def test_what_a_template_objects_to_is_a_bad_row(encoder, source, messages, why):
    with pytest.raises(BadRow, match=why):
        encoder(source).template.spans(talk(messages))


def test_a_template_that_marks_nothing_leaves_a_bad_row(encoder):
    silent = "{{ messages[0].content }}{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    with pytest.raises(BadRow, match="every label is masked"):
        encoder(silent).encode("conversation", {"messages": talk(TALKS[0])})


def test_templates_come_as_text_or_file_and_are_refused_with_their_key(encoder, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(BLOCKS)
    assert encoder(str(file)).fingerprint == encoder(BLOCKS).fingerprint != encoder().fingerprint
    for wrong, why in (("no-such-file", "cannot be read"), ("{% if %}", "line 1"), ("{{ x", "line 1")):
        with pytest.raises(Refused) as refused:
            encoder(wrong).encode("conversation", {"messages": talk(TALKS[0])})
        assert refused.value.problems[0].key == "model.chat_template"
        assert why in refused.value.problems[0].why


def sft_columns(tokenizer, rows, max_length, **config):
    """What TRL's SFTTrainer makes of rows; its own method, without a model."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(output_dir="unused", max_length=max_length, use_cpu=True, bf16=False, **config)
    trainer = types.SimpleNamespace(
        _tokenizer=tokenizer, chat_template=None, completion_only_loss="prompt" in rows[0]
    )
    made = SFTTrainer._prepare_dataset(
        trainer, Dataset.from_list(rows), tokenizer, args, False, None, "train"
    )
    return made.to_list()


@pytest.mark.parametrize(
    "rows",
    [
        [
            {"prompt": "The lamp is", "completion": " lit."},
            {"prompt": "Grüße ", "completion": "aus 東京 🙂"},
            {"prompt": "ends", "completion": " already<|im_end|>"},
            {"prompt": "long " * 20, "completion": "x " * 60},
        ],
        [
            {
                "prompt": talk([("user", "a"), ("assistant", "b"), ("user", "c")]),
                "completion": talk([("assistant", "d e")]),
            },
            {"prompt": talk([("system", "s"), ("user", "🙂")]), "completion": talk([("assistant", " 東")])},
        ],
        [{"text": "The lamp is lit."}, {"text": "東京 🙂" * 40}, {"text": "done<|im_end|>"}],
    ],
)
def test_rows_equal_what_sft_trainer_makes_of_them(encoder, tokenizer, rows):
    expected = sft_columns(tokenizer, rows, max_length=64)
    made = [encoder(None, 64).encode("conversation", row) for row in rows]
    kept = [one.columns for one in made if not one.nothing_left]
    assert [one["input_ids"].tolist() for one in kept] == [one["input_ids"] for one in expected]
    assert [one["labels"].tolist() for one in kept] == [one["labels"] for one in expected]
    assert "prompt" not in rows[0] or len(rows) < 4 or len(kept) == 3  # one prompt fills the whole length


def test_whole_conversations_equal_sft_trainers(encoder, tokenizer, monkeypatch):
    rows = [{"messages": talk(turns)} for turns in TALKS[:3]]
    monkeypatch.setattr(tokenizer, "chat_template", BLOCKS)
    expected = sft_columns(tokenizer, rows, max_length=64, assistant_only_loss=True)
    for row, columns in zip(rows, expected, strict=True):
        got = encoder(BLOCKS, 64).encode("conversation", row).columns
        assert got["input_ids"].tolist() == columns["input_ids"]
        assert got["labels"].tolist() == columns["labels"]


def test_only_the_assistants_turns_of_a_completion_are_learnt(encoder, tokenizer):
    example = {
        "prompt": talk([("user", "a"), ("assistant", "b"), ("user", "c")]),
        "completion": talk([("assistant", "d"), ("user", "e"), ("assistant", "f")]),
    }
    got = encoder().encode("conversation", example).columns
    learnt = [token for token, label in zip(got["input_ids"], got["labels"], strict=True) if label != MASKED]
    assert tokenizer.decode(learnt) == "d<|im_end|>\nf<|im_end|>\n"


def test_pretraining_learns_every_token_of_any_format(encoder, tokenizer):
    for example, text in (
        ({"text": "Once."}, "Once.<|im_end|>"),
        ({"prompt": "a", "completion": "b"}, "ab<|im_end|>"),
        ({"messages": talk(TALKS[1])}, None),
    ):
        got = encoder().encode("text", example)
        text = text or tokenizer.apply_chat_template(talk(TALKS[1]), tokenize=False)
        assert tokenizer.decode(got.columns["input_ids"]) == text
        assert got.columns["labels"].tolist() == got.columns["input_ids"].tolist()


def test_truncation_keeps_the_start_and_says_when_nothing_is_left(encoder):
    example = {"messages": talk([("user", "a b c"), ("assistant", "The lamp is lit and the keeper writes.")])}
    whole = encoder().encode("conversation", example)
    first = whole.columns["labels"].tolist().index(next(x for x in whole.columns["labels"] if x != MASKED))
    cut = encoder(None, first + 1).encode("conversation", example)
    assert (cut.length, cut.learnt, cut.too_long, cut.nothing_left) == (first + 1, 1, True, False)
    assert cut.full_length == whole.length
    assert cut.columns["input_ids"].tolist() == whole.columns["input_ids"].tolist()[: first + 1]
    none = encoder(None, first).encode("conversation", example)
    assert (none.learnt, none.nothing_left) == (0, True)


PAIRS = {
    "texts": {"prompt": "The lamp", "chosen": " is lit.", "rejected": " is not lit at all, quick."},
    "messages": {
        "prompt": talk([("system", "Be brief."), ("user", "An egg?")]),
        "chosen": talk([("assistant", "Six minutes and a half, then cold water.")]),
        "rejected": talk([("assistant", "Grüße 🙂")]),
    },
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("max_length", [10_000, 40, 30])
def test_pairs_have_the_tokens_of_trls_trainer(encoder, tokenizer, pair, max_length, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    args = DPOConfig(str(tmp_path), max_length=max_length, report_to="none", bf16=False)
    owner = types.SimpleNamespace(_tokenizer=tokenizer)
    theirs = DPOTrainer._prepare_dataset(owner, Dataset.from_list([pair]), tokenizer, args, "train")
    got = encoder(None, max_length).encode("preference", pair)
    assert got.nothing_left == (len(theirs) == 0)
    if got.nothing_left:
        return
    assert {name: got.columns[name] for name in pair} == pair
    collate = DataCollatorForPreference(pad_token_id=0, max_length=max_length)
    ours = collate([{name: ids for name, ids in got.columns.items() if name.endswith("_ids")}])
    for name, values in collate([theirs[0]]).items():
        assert ours[name].tolist() == values.tolist(), name
    assert got.learnt == int(ours["completion_mask"].sum(1).max())
    assert got.length == int(ours["attention_mask"].sum(1).max())
    assert got.full_length >= got.length


def test_a_pair_whose_prompt_leaves_no_room_has_nothing_left(encoder, tokenizer):
    pair = PAIRS["texts"]
    prompt = len(tokenizer(pair["prompt"])["input_ids"])
    assert encoder(None, prompt).encode("preference", pair).nothing_left
    assert not encoder(None, prompt + 1).encode("preference", pair).nothing_left


def test_token_ids_are_transformers(encoder, tokenizer):
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert encoder().token_id(name) == getattr(tokenizer, f"{name}_id")


def test_a_folder_without_a_tokenizer_template_or_end_token_is_refused(tmp_path, model_folder):
    def encoder(folder):
        return Encoder(folder, chat_template=None, max_length=8, on_too_long="truncate")

    with pytest.raises(Refused, match="model.base"):
        encoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(Refused, match="tokenizer.json cannot be read"):
        encoder(tmp_path).tokenizer  # noqa: B018
    (tmp_path / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
    with pytest.raises(Refused, match="eos_token"):
        encoder(tmp_path).encode("text", {"text": "a"})
    with pytest.raises(Refused, match="no chat template"):
        encoder(tmp_path).encode("conversation", {"messages": talk(TALKS[0])})


def test_special_tokens_outside_tokenizer_json_are_added_as_transformers_adds_them(tmp_path, model_folder):
    import json

    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
    config = json.loads((model_folder / "tokenizer_config.json").read_text())
    config |= {
        "eos_token": "<|eot|>",
        "extra_special_tokens": ["<|extra|>"],
        "chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(BLOCKS)
    expected = AutoTokenizer.from_pretrained(tmp_path)
    assert Encoder(tmp_path, chat_template=None, max_length=1, on_too_long="skip").template.source == BLOCKS
    (tmp_path / "chat_template.jinja").unlink()
    got = Encoder(tmp_path, chat_template=None, max_length=64, on_too_long="truncate")
    text = "a<|extra|>b<|eot|>"
    assert got.tokenizer.encode(text).ids == expected(text)["input_ids"]
    assert expected.chat_template == BLOCKS and got.template.source == "y"
