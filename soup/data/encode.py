"""Examples of a shape as token ids and labels, equal to TRL 1.12's own preparation token for token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soup.data.rows import BadRow
from soup.data.shapes import ANSWERS, TOKENISED
from soup.data.template import Span, Template, training_variant
from soup.data.tokenizer import TokenizerFiles
from soup.errors import Problem, Refused

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

MASKED = -100  # the label of a token that is not learnt, as torch's cross entropy ignores it
ON_TOO_LONG = ("truncate", "skip", "refuse")


@dataclass(frozen=True)
class Encoded:
    """One example for the trainer. `length` and `learnt` count tokens, after truncation where there is one.

    `full_length` is the length before it. A pair counts as its longer side.
    `nothing_left`: truncated to `max_length`, it would have nothing to learn from.
    """

    columns: dict[str, Any]
    full_length: int
    length: int
    learnt: int
    nothing_left: bool

    @property
    def too_long(self) -> bool:
        return self.full_length > self.length or self.nothing_left


@dataclass(frozen=True)
class _Rendered:
    """`texts`: what is tokenised, the whole example first. `special`: whether the tokenizer adds its own
    tokens (it does to plain text; a chat template writes them itself). `spans`: the learnt characters."""

    texts: tuple[str, ...]
    special: bool
    spans: list[Span] | None = None


class Encoder:
    """A model folder's tokenizer and chat template, and what is done with an example that is too long.

    `chat_template` is a template, or the file that holds one; None means the folder's own. `max_length` is
    in tokens. Raises Refused for a folder without a tokenizer and a template file that is not there; a
    missing template or end-of-text token is refused once something needs it.
    """

    def __init__(self, model_folder: Path, *, chat_template: str | None, max_length: int, on_too_long: str):
        if on_too_long not in ON_TOO_LONG:
            raise Refused(
                Problem(
                    key="data.on_too_long",
                    value=on_too_long,
                    why="there is no such choice",
                    fix=f"one of {', '.join(ON_TOO_LONG)}",
                )
            )
        if max_length < 1:
            raise Refused(
                Problem(
                    key="data.max_length",
                    value=max_length,
                    why="must be at least 1 token",
                    fix="data.max_length=512, for example",
                )
            )
        self._files = TokenizerFiles(Path(model_folder))
        self.max_length = max_length
        self.on_too_long = on_too_long
        source = self._files.chat_template if chat_template is None else template_text(chat_template)
        self._source = source
        self._learning_source = None if source is None else training_variant(source)
        self.special_tokens = self._files.special_tokens

    @cached_property
    def fingerprint(self) -> str:
        """Of the tokenizer, the special tokens, the templates and the settings."""
        config = self._files.config
        settings = [
            self._source,
            self._learning_source,
            self.special_tokens,
            self.max_length,
            self.on_too_long,
            [
                config.get(key)
                for key in ("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens")
            ],
        ]
        digest = hashlib.sha256(self._files.raw)
        digest.update(json.dumps(settings, sort_keys=True).encode())
        return digest.hexdigest()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self._files.load()

    @cached_property
    def template(self) -> Template:
        """The model's template, with which prompts are written."""
        return self._template(self._source)

    @cached_property
    def learning_template(self) -> Template:
        """The template for whole conversations: TRL's training variant, where TRL has one for the model's."""
        return self._template(self._learning_source)

    def _template(self, source: str | None) -> Template:
        if source is None:
            raise Refused(
                Problem(
                    key="model.chat_template",
                    why="the model has no chat template, and the data are conversations",
                    fix="give one (text or file), or data as prompt/completion texts",
                )
            )
        return Template(source, self.special_tokens)

    @property
    def eos_token(self) -> str:
        """The text that ends a document or completion."""
        if "eos_token" not in self.special_tokens:
            raise Refused(
                Problem(
                    key="model.base",
                    value=str(self._files.folder),
                    why="its tokenizer has no end-of-text token (eos_token)",
                    fix='set "eos_token" in its tokenizer_config.json',
                )
            )
        return self.special_tokens["eos_token"]

    def token_id(self, name: str) -> int | None:
        """The id of `bos_token`, `eos_token`, `pad_token`, ...; None where the model names none."""
        token = self.special_tokens.get(name)
        return None if token is None else self.tokenizer.token_to_id(token)

    def encode(self, shape: str, example: dict[str, Any]) -> Encoded:
        """One example of `shape` (`soup.data.shapes`). Raises BadRow where nothing in it could be learnt.

        `columns` holds, for `conversation` and `text`, `input_ids` and `labels` (MASKED where not learnt),
        truncated at the end to `max_length`. For pairs and rated answers it holds the example, `prompt_ids`, and
        the ids of each answer (`chosen_ids`, `rejected_ids`, `completion_ids`), which end where prompt and answer
        reach `max_length`. A prompt alone stays as it is.
        """
        result = self.encode_batch(shape, [example])[0]
        if isinstance(result, BadRow):
            raise result
        return result

    def encode_batch(self, shape: str, examples: Sequence[dict[str, Any]]) -> list[Encoded | BadRow]:
        """The same for several at once, tokenised in parallel; a BadRow stands in its example's place."""
        render = self._render if shape in TOKENISED else self._render_sides
        rendered: list[_Rendered | BadRow] = []
        for example in examples:
            try:
                rendered.append(render(shape, example))
            except BadRow as error:
                rendered.append(error)
        encodings: dict[bool, Any] = {}
        for special in (True, False):
            texts = [
                text
                for one in rendered
                if isinstance(one, _Rendered) and one.special == special
                for text in one.texts
            ]
            encodings[special] = iter(
                self.tokenizer.encode_batch(texts, add_special_tokens=special) if texts else ()
            )
        results: list[Encoded | BadRow] = []
        for example, one in zip(examples, rendered, strict=True):
            if isinstance(one, BadRow):
                results.append(one)
                continue
            tokens = [next(encodings[one.special]) for _ in one.texts]
            results.append(
                self._labelled(tokens, one.spans)
                if shape in TOKENISED
                else self._sided(tokens, example, shape)
            )
        return results

    def _render(self, shape: str, example: dict[str, Any]) -> _Rendered:
        if "text" in example:
            return _Rendered((self._ended(example["text"]),), special=True)
        if "messages" in example:
            if shape == "text":
                return _Rendered((self.template.render(example["messages"]),), special=False)
            text, spans = self.learning_template.spans(example["messages"])
            return _Rendered((text,), special=False, spans=spans)
        prompt, completion = example["prompt"], example["completion"]
        if isinstance(prompt, str):
            whole = prompt + self._ended(completion)
            return _Rendered((whole,) if shape == "text" else (whole, prompt), special=True)
        if shape == "text":
            return _Rendered((self.template.render([*prompt, *completion]),), special=False)
        template = self.template if len(completion) == 1 else self.learning_template
        text, spans = template.completion(prompt, completion)
        return _Rendered((text,), special=False, spans=spans)

    def _render_sides(self, shape: str, example: dict[str, Any]) -> _Rendered:
        """Prompt first, then prompt and each answer, as TRL's trainers tokenise them."""
        prompt, names = example["prompt"], ANSWERS[shape]
        if isinstance(prompt, str):
            return _Rendered((prompt, *(prompt + self._ended(example[name]) for name in names)), special=True)
        sides = [self.template.render([*prompt, *example[name]]) for name in names]
        return _Rendered((self.template.render(prompt, generation_prompt=True), *sides), special=False)

    def _ended(self, text: str) -> str:
        return text if text.endswith(self.eos_token) else text + self.eos_token

    def _labelled(self, encodings: list[Encoding], spans: list[Span] | None) -> Encoded | BadRow:
        import numpy as np

        ids_T = np.array(encodings[0].ids, dtype=np.int32)
        if spans is not None:
            learnt_T = _overlaps(np.array(encodings[0].offsets).reshape(-1, 2), spans)
        else:
            # Plain prompt and completion, as TRL counts: the prompt's tokens as it is tokenised alone.
            learnt_T = np.arange(len(ids_T)) >= (len(encodings[1].ids) if len(encodings) > 1 else 0)
        if not learnt_T.any():
            return BadRow(
                "every label is masked: no token of it is the assistant's",
                "check that the chat template writes assistant turns, and marks them if it marks any",
            )
        labels_T = np.where(learnt_T, ids_T, MASKED)[: self.max_length]
        learnt = int(learnt_T[: self.max_length].sum())
        ids = ids_T[: self.max_length]
        return Encoded(
            {"input_ids": ids, "labels": labels_T},
            full_length=len(ids_T),
            length=len(ids),
            learnt=learnt,
            nothing_left=learnt == 0,
        )

    def _sided(self, encodings: list[Encoding], example: dict[str, Any], shape: str) -> Encoded:
        """`nothing_left` as TRL drops rows: where the prompt alone fills `max_length`."""
        prompt_T, *sides_T = (encoding.ids for encoding in encodings)
        asked = len(prompt_T)
        answers = {
            f"{name}_ids": side_T[asked : self.max_length]
            for name, side_T in zip(ANSWERS[shape], sides_T, strict=True)
        }
        full = max(asked, *map(len, sides_T)) if sides_T else asked
        return Encoded(
            {**example, **({"prompt_ids": prompt_T} if answers else {}), **answers},
            full_length=full,
            length=min(full, self.max_length),
            learnt=max(map(len, answers.values()), default=0),
            nothing_left=asked >= self.max_length,
        )


def _overlaps(offsets_T2: Any, spans: list[Span]) -> Any:
    """Which tokens share a character with a span; a token that covers no character shares none."""
    import numpy as np

    starts, ends = offsets_T2[:, 0], offsets_T2[:, 1]
    learnt_T = np.zeros(len(offsets_T2), dtype=bool)
    for start, end in spans:
        learnt_T |= (starts < end) & (ends > start) & (ends > starts)
    return learnt_T


def template_text(chat_template: str) -> str:
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise Refused(
            Problem(
                key="model.chat_template",
                value=chat_template,
                why=f"is no template, and as a file cannot be read: {error}",
                fix="give a Jinja template or a file that holds one",
            )
        ) from error
