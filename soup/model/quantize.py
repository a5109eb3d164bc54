"""`python -m soup.model.quantize 4bit GROUP MODEL FOLDER`: a trained model in the integers that it was trained for.

An adapter is folded in first, in float32. torchao's integers of 4 bits are written one to a byte: it has no packed
format that every device reads. Scales are float32, one for each group of inputs.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from soup.model.merge import merge
from soup.model.qat import BITS


def quantize(kind: str, group: int, model: Path, target: Path) -> None:
    """Writes a folder that plain transformers with torchao loads; whole or absent."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TorchAoConfig,
    )

    partial, folded = target.with_name(f".{target.name}"), target.with_name(f".{target.name}-folded")
    for folder in (partial, folded):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        plain = model
        if (model / "adapter_config.json").is_file():
            merge(model, folded)
            plain = folded
        (architecture,) = AutoConfig.from_pretrained(plain).architectures
        scores = architecture.endswith("ForSequenceClassification")
        loader = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
        config = TorchAoConfig(
            IntxWeightOnlyConfig(weight_dtype=BITS[kind], granularity=PerGroup(group)),
            modules_to_not_convert=["score"]
            if scores
            else None,  # the head of the others is left out by itself
        )
        loader.from_pretrained(plain, dtype="float32", quantization_config=config).save_pretrained(partial)
        AutoTokenizer.from_pretrained(model).save_pretrained(partial)
        os.replace(partial, target)
    finally:
        for folder in (partial, folded):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    quantize(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
