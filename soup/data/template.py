"""Chat templates: a conversation as text, and which of its characters the assistant generated."""

from __future__ import annotations

import importlib.util
import json
import re
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from soup.data.messages import Messages
from soup.data.rows import BadRow
from soup.errors import Problem, Refused

Span = tuple[int, int]  # characters [start, end)
_BLOCKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKERS = "give a `model.chat_template` that marks what the assistant generates with {% generation %} blocks"


class Template:
    """A chat template, rendered as transformers 5.17's `apply_chat_template` does.

    The environment repeats `transformers.utils.chat_template_utils` on jinja2 itself, since importing
    transformers costs seconds. `special_tokens` (`bos_token`, ...) are variables of the template.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]):
        self.source = source
        self.has_blocks = _BLOCKS.search(source) is not None
        self._special_tokens = special_tokens
        self._now = datetime.now()  # one moment for all renderings, which are compared with each other

    @cached_property
    def _compiled(self) -> Any:
        import jinja2

        try:
            return _environment(self._now).from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise Refused(
                Problem(
                    key="model.chat_template",
                    why=f"line {error.lineno}: {error.message}",
                    fix="repair the template",
                )
            ) from error

    def render(self, messages: Messages, *, generation_prompt: bool = False) -> str:
        """The conversation as text. Raises BadRow with the template's own message where it objects."""
        return self._render(messages, generation_prompt)[0]

    def spans(self, messages: Messages) -> tuple[str, list[Span]]:
        """The conversation as text, and the characters of it that the assistant generated.

        A template with {% generation %} blocks says which those are. For another, an assistant turn is what
        its rendering adds to the rendering of the turns before it with the generation prompt: from the first
        character that the model would generate to the last that the turn writes, the end-of-turn token
        included. That is exact only where each turn's rendering starts with the one before; a template for
        which it does not raises BadRow.
        """
        if self.has_blocks:
            return self._render(messages, False)
        text = self.render(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._before(messages[:index])
                upto = text if index + 1 == len(messages) else self.render(messages[: index + 1])
                if not (upto.startswith(before) and text.startswith(upto)):
                    raise BadRow(
                        "the chat template renders earlier turns differently once later ones follow, so "
                        f"the start and end of turn {index + 1} cannot be told",
                        _MARKERS,
                    )
                spans.append((len(before), len(upto)))
        return text, spans

    def _before(self, messages: Messages) -> str:
        """What the model sees when it begins to answer `messages`."""
        try:
            return self.render(messages, generation_prompt=True)
        except BadRow as error:
            if messages:
                raise
            raise BadRow(
                "the conversation starts with an assistant turn, which this chat template cannot render",
                "put a user's turn before it",
            ) from error

    def completion(self, prompt: Messages, completion: Messages) -> tuple[str, list[Span]]:
        """The same of `prompt` + `completion`, where only the completion's assistant turns are learnt."""
        before = self.render(prompt, generation_prompt=True)
        if len(completion) == 1:
            text = self.render([*prompt, *completion])
            spans = [(len(before), len(text))]
        else:
            text, spans = self.spans([*prompt, *completion])
        if not text.startswith(before):
            raise BadRow(
                "the chat template renders the prompt differently once the completion follows", _MARKERS
            )
        return text, [(max(start, len(before)), end) for start, end in spans if end > len(before)]

    def _render(self, messages: Messages, generation_prompt: bool) -> tuple[str, list[Span]]:
        blocks: list[str] = []
        spans: list[Span] = []
        try:
            with self._compiled.environment.tracking(blocks, spans):
                for block in self._compiled.generate(
                    messages=messages,
                    tools=None,
                    documents=None,
                    add_generation_prompt=generation_prompt,
                    **self._special_tokens,
                ):
                    blocks.append(block)
        except Refused:
            raise
        except Exception as error:  # a template is a program of the user's: it may raise anything
            raise BadRow(
                f"the chat template refuses the conversation: {error}",
                "change the turns, or give another `model.chat_template`",
            ) from error
        return "".join(blocks), spans


def _environment(now: datetime) -> Any:
    """The jinja2 environment of `transformers.utils.chat_template_utils._cached_compile_jinja_template`."""
    from contextlib import contextmanager

    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlocks(jinja2.ext.Extension):
        tags = {"generation"}

        def __init__(self, environment: Any):
            super().__init__(environment)
            environment.extend(tracking=self.tracking)
            self._blocks: list[str] = []
            self._spans: list[Span] = []

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_generated")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _generated(self, caller: Any) -> str:
            said = caller()
            start = sum(map(len, self._blocks))
            self._spans.append((start, start + len(said)))
            return said

        @contextmanager
        def tracking(self, blocks: list[str], spans: list[Span]) -> Any:
            self._blocks, self._spans = blocks, spans
            yield

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    return environment


def training_variant(source: str) -> str:
    """TRL's training template for a model's own, where TRL has one; else `source`.

    As `trl.chat_template_utils.get_training_chat_template` chooses it, for the same reason: templates as
    Qwen3's drop what earlier turns thought, and none marks what is generated. TRL is found, not imported.
    """
    found = importlib.util.find_spec("trl")
    if _BLOCKS.search(source) or found is None or found.origin is None:
        return source
    for variant in sorted((Path(found.origin).parent / "chat_templates").glob("*_training.jinja")):
        plain = variant.with_name(variant.name.replace("_training", ""))
        if plain.is_file() and plain.read_text(encoding="utf-8") == source:
            return variant.read_text(encoding="utf-8")
    return source
