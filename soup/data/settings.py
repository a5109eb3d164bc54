"""The arguments of `prepare`, `lengths` and `fingerprint`, and what they make of each other."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from soup.data.encode import Encoder
from soup.data.files import resolve_sources, source_names
from soup.data.formats import FORMATS
from soup.data.shapes import ACCEPTS, SHAPES, convert
from soup.errors import Problem, Refused

ON_BAD_ROW = ("refuse", "skip")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`train`, `eval`: files, folders, globs or hub names (`soup.data.files`); `eval` may be None.
    `weights`: one for each source of `train`, in proportion to the rows that it gives; None takes them all.
    `eval_fraction`: of the training rows, held out where there is no `eval`; 0 holds out none.
    `split_seed`: which rows those are. `format`: auto, or one of `soup.data.formats.FORMATS`.
    `shape`: what the task needs, one of `soup.data.shapes.SHAPES`.
    `model_folder`: a local folder with a tokenizer. `chat_template`: text, file or None for the model's own.
    `max_length`: tokens. `on_bad_row`: refuse, skip. `on_too_long`: truncate, skip, refuse.
    `max_samples`: usable rows to take from the start of `train`; None takes all.
    `num_proc`: threads that tokenise; it changes nothing in the result.
    `streaming`: the rows to train on are read again in each epoch, in an order drawn by `split_seed`.
    `numbers`: columns of the training rows that hold a number each, and are kept beside the tokens.
    `cache`: the folder under which `tokenised/<fingerprint>/` lies.

    Raises Refused for values that cannot be, all at once.
    """

    train: str | Sequence[str]
    eval: str | Sequence[str] | None
    weights: Sequence[float] | None = None
    eval_fraction: float
    split_seed: int
    format: str
    shape: str
    model_folder: Path
    chat_template: str | None
    max_length: int
    on_bad_row: str
    on_too_long: str
    max_samples: int | None
    num_proc: int
    streaming: bool = False
    cache: Path
    numbers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"no such shape: {self.shape}")
        problems = []
        for key, value, choices in (
            ("data.format", self.format, ("auto", *FORMATS)),
            ("data.on_bad_row", self.on_bad_row, ON_BAD_ROW),
        ):
            if value not in choices:
                problems.append(
                    Problem(
                        key=key,
                        value=value,
                        why="there is no such choice",
                        fix=f"one of {', '.join(choices)}",
                    )
                )
        if not 0 <= self.eval_fraction < 1:
            problems.append(
                Problem(
                    key="data.eval_fraction",
                    value=self.eval_fraction,
                    why="must be at least 0 and less than 1",
                    fix="data.eval_fraction=0.05",
                )
            )
        elif self.eval is not None and self.eval_fraction > 0:
            problems.append(
                Problem(
                    key="data.eval_fraction",
                    value=self.eval_fraction,
                    why="data.eval names the rows to evaluate on already",
                    fix="data.eval_fraction=0",
                )
            )
        for key, number in (("data.max_samples", self.max_samples), ("data.num_proc", self.num_proc)):
            if number is not None and number < 1:
                problems.append(
                    Problem(key=key, value=number, why="must be at least 1", fix=f"{key}=1 or more")
                )
        if self.weights is not None and not self._weighed():
            problems.append(
                Problem(
                    key="data.weights",
                    value=list(self.weights),
                    why=f"needs one positive number for each of several sources, and data.train names "
                    f"{len(source_names(self.train))}",
                    fix="data.weights=null, or as many as data.train",
                )
            )
        if problems:
            raise Refused(problems)

    def _weighed(self) -> bool:
        names = source_names(self.train)
        return len(names) == len(self.weights) > 1 and all(0 < one < math.inf for one in self.weights)

    @cached_property
    def sources(self) -> dict[str, list[list[Path]]]:
        """Split name to the files of each of its sources, in order. What is wrong with either is said together."""
        named: dict[str, list[list[Path]]] = {}
        problems: list[Problem] = []
        for split, value in (("train", self.train), ("eval", self.eval)):
            try:
                if value is not None:
                    named[split] = resolve_sources(value, key=f"data.{split}")
            except Refused as refused:
                problems += refused.problems
        if problems:
            raise Refused(problems)
        return named

    def names(self, split: str) -> list[str]:
        """What the sources of a split are called."""
        return source_names(self.train if split == "train" else self.eval)

    def shares(self, split: str) -> list[float] | None:
        """What each source gives of the rows; None where all rows are taken, one source after the other."""
        if split != "train" or self.weights is None:
            return None
        return [weight / sum(self.weights) for weight in self.weights]

    def streams(self, split: str) -> bool:
        """Whether the split is read while training."""
        return self.streaming and split == "train"

    @cached_property
    def files(self) -> dict[str, list[Path]]:
        """Split name to files, in order."""
        return {split: [file for one in sources for file in one] for split, sources in self.sources.items()}

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(
            self.model_folder,
            chat_template=self.chat_template,
            max_length=self.max_length,
            on_too_long=self.on_too_long,
        )

    @cached_property
    def fingerprint(self) -> str:
        """The same data, tokenizer, template, settings and code: the same fingerprint, wherever they lie."""
        digest = hashlib.sha256(self.encoder.fingerprint.encode())
        settings = [
            self.eval_fraction,
            self.split_seed if self.eval_fraction else None,
            self.format,
            self.shape,
            self.on_bad_row,
            self.max_samples,
            None if self.weights is None else list(self.weights),
            self.streaming,
            self.numbers,
            importlib.metadata.version("tokenizers"),
        ]
        digest.update(json.dumps(settings).encode())
        for split, sources in self.sources.items():
            for number, files in enumerate(sources):
                for file in files:
                    digest.update(f"{split}{number}{''.join(file.suffixes)}".encode())
                    digest.update(_digest(file))
        for source in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(_digest(source))
        return digest.hexdigest()[:32]

    def check_accepted(self, format: str, split: str, files: Sequence[Path]) -> None:
        """Raises Refused where `format`, seen in the rows or given, cannot make rows of `shape`."""
        if format not in ACCEPTS[self.shape]:
            seen = self.format == "auto"
            raise Refused(
                Problem(
                    key=f"data.{split}" if seen else "data.format",
                    value=", ".join(map(str, files[:3])) if seen else format,
                    why=f"the data are of format {format}; the task needs {self.shape} rows",
                    fix=convert(self.shape),
                )
            )


def _digest(file: Path) -> bytes:
    try:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while part := stream.read(1 << 20):
                digest.update(part)
        return digest.digest()
    except OSError as error:
        raise Refused(
            Problem(
                key=str(file),
                why=f"cannot be read: {error.strerror}",
                fix="check the file and its permissions",
            )
        ) from error
