"""A model folder's tokenizer, special tokens and chat template, resolved as transformers 5.17 resolves them.

`tokenizers` reads tokenizer.json in a tenth of a second; AutoTokenizer would import torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soup.errors import Problem, Refused

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerFiles:
    """What a model folder says of its tokenizer. Raises Refused (key `model.base`) where it has none."""

    def __init__(self, folder: Path):
        self.folder = folder
        file = folder / "tokenizer.json"
        try:
            self.raw = file.read_bytes()
        except OSError as error:
            raise Refused(
                Problem(
                    key="model.base",
                    value=str(folder),
                    why=f"{file} cannot be read ({error.strerror})",
                    fix="give a model folder with a tokenizer.json; AutoTokenizer.from_pretrained(...)"
                    ".save_pretrained(...) writes one",
                )
            ) from error
        self.config = _json(folder / "tokenizer_config.json")
        # As transformers: the older file is read where the newer one does not list the added tokens.
        if "added_tokens_decoder" not in self.config:
            self.config |= _json(folder / "special_tokens_map.json")
        self.special_tokens = {
            name: _content(value)
            for name, value in self.config.items()
            if (name in _NAMED or name.endswith("_token")) and _content(value) is not None
        }

    @property
    def chat_template(self) -> str | None:
        """The default chat template: chat_template.jinja before the entry in tokenizer_config.json."""
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        entry = self.config.get("chat_template")
        if isinstance(entry, list):
            entry = {one.get("name"): one.get("template") for one in entry}
        return entry.get("default") if isinstance(entry, dict) else entry

    def load(self) -> Tokenizer:
        """The tokenizer: no truncation, no padding, and offsets that leave no character out."""
        from tokenizers import AddedToken, Tokenizer

        try:
            data = json.loads(self.raw)
            added = self.config.get("added_tokens_decoder") or {}
            added = [AddedToken(**flags) for _, flags in sorted(added.items(), key=lambda one: int(one[0]))]
            trims = _untrim(data.get("post_processor"))
            tokenizer = Tokenizer.from_str(json.dumps(data) if trims else self.raw.decode())
        except Exception as error:  # tokenizers raises bare Exception
            raise Refused(
                Problem(
                    key="model.base",
                    value=str(self.folder),
                    fix="download or save the model again",
                    why=f"its tokenizer.json cannot be read: {error}",
                )
            ) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # transformers adds what the configuration names and tokenizer.json does not have as an added token.
        known = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_tokens([token for token in added if repr(token) not in known])
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        extra = self.config.get("extra_special_tokens", self.config.get("additional_special_tokens")) or []
        extra = [_content(token) for token in (extra.values() if isinstance(extra, dict) else extra)]
        for content in dict.fromkeys([*self.special_tokens.values(), *extra]):
            if content not in known:
                tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False)])
        return tokenizer


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Refused(
            Problem(
                key="model.base",
                value=str(file.parent),
                why=f"{file.name} cannot be read: {error}",
                fix="download or save the model again",
            )
        ) from error
    return value if isinstance(value, dict) else {}


def _content(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _untrim(processor: Any) -> bool:
    """Make byte-level post-processing leave offsets whole; by default it takes the spaces off tokens.

    A token that is all spaces would else cover no character, and never be learnt. The ids do not change.
    """
    if isinstance(processor, list):
        return any([_untrim(one) for one in processor])
    if not isinstance(processor, dict):
        return False
    trims = processor.get("trim_offsets") is True
    if trims:
        processor["trim_offsets"] = False
    return _untrim(processor.get("processors")) or trims
