"""The arguments of `prepare`, and an encoder, on the small tokenizer of tests/conftest.py."""

import json

import pytest


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
