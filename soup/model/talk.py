"""A run's model that answers: piece by piece, or many prompts at a time; the model that it started from beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from threading import Thread
from typing import Any

from soup.device import resolve
from soup.errors import Problem, Refused
from soup.record import Run
from soup.schema import check

BATCH = 8  # prompts that are answered together
Prompt = str | list[dict[str, Any]]


class Speaker:
    """The model in a run's folder, and with `base` the one that it started from.

    `temperature` 0 takes the likeliest token each time; above, tokens are drawn from the run's seed.

    Raises:
        Refused: the run has no model, or one that scores and does not answer.
    """

    def __init__(self, run: Run, *, base: bool, max_tokens: int, temperature: float):
        config = check(run.tree())
        if config.task.head == "score":
            why = "is a reward model, which gives a number and no answer"
            raise Refused(Problem(key="run", value=run.id, why=why, fix="a run of another task"))
        if not run.model.is_dir():
            why = f"has no model: it is {run.state()}"
            raise Refused(Problem(key="run", value=run.id, why=why, fix=f"soup runs resume {run.id}"))
        import torch
        from transformers import AutoTokenizer, set_seed
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        device = resolve("auto")
        dtype = torch.bfloat16 if device.bf16 else torch.float32
        self.tokenizer = AutoTokenizer.from_pretrained(run.model, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._model = _loaded(run, config.model.base, config.model.trust_remote_code, dtype, device.kind)
        self._adapter = config.lora.r is not None
        self._base = (
            self._model if self._adapter else _started_from(config, dtype, device.kind) if base else None
        )
        self._options = {"max_new_tokens": max_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self._options |= {"temperature": temperature, "top_p": 1.0, "top_k": 0}
            set_seed(config.training.seed)

    def stream(self, prompt: Prompt, *, base: bool = False) -> Iterator[str]:
        """The answer as it is made. Leaving the iterator early stops the model."""
        from transformers import StoppingCriteria, TextIteratorStreamer

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed: list[BaseException] = []
        left = False

        class Left(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:  # noqa: ARG002
                return left

        def generate() -> None:
            try:
                self._generate([prompt], base=base, streamer=streamer, stopping_criteria=[Left()])
            except BaseException as error:  # noqa: BLE001 - raised where the answer is read
                failed.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            left = True
            thread.join()
        if failed:
            raise failed[0]

    def answers(self, prompts: Sequence[Prompt], *, base: bool = False) -> Iterator[str]:
        """An answer to each prompt, in their order."""
        for start in range(0, len(prompts), BATCH):
            ids, length = self._generate(prompts[start : start + BATCH], base=base)
            yield from self.tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)

    def _generate(self, prompts: Sequence[Prompt], *, base: bool, **options: Any) -> tuple[Any, int]:
        import torch

        texts = [self._rendered(prompt) for prompt in prompts]
        model = self._base if base else self._model
        # A rendered chat has its special tokens; a text gets those that the tokenizer gives every text.
        special = self.tokenizer.chat_template is None
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=special).to(
            model.device
        )
        off = model.disable_adapter() if base and self._adapter else nullcontext()
        with torch.no_grad(), off:
            ids = model.generate(
                **batch, pad_token_id=self.tokenizer.pad_token_id, **self._options, **options
            )
        return ids, batch["input_ids"].shape[1]

    def _rendered(self, prompt: Prompt) -> str:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.tokenizer.chat_template is None:  # a model of plain text goes on with it
            return "\n".join(message["content"] for message in messages)
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _loaded(run: Run, base: str, trust: bool, dtype: Any, device: str) -> Any:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    from soup.rope import changed

    try:
        if (run.model / "adapter_config.json").is_file():
            model = AutoPeftModelForCausalLM.from_pretrained(
                run.model, dtype=dtype, trust_remote_code=trust, **changed(run.model)
            )
        else:
            model = AutoModelForCausalLM.from_pretrained(run.model, dtype=dtype, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        gone = base.startswith(("/", ".", "~")) and not Path(base).expanduser().is_dir()
        why = "lacks its base" if gone else f"does not load: {str(error).strip().splitlines()[0]}"
        fix = f"its base, {base}, where it was when the run was trained"
        raise Refused(Problem(key="run", value=run.id, why=why, fix=fix)) from error
    return model.to(device).eval()


def _started_from(config: Any, dtype: Any, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    from soup.model import source

    folder = source.folder(config.model)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=config.model.trust_remote_code
    )
    return model.to(device).eval()
