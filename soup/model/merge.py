"""`python -m soup.model.merge ADAPTER FOLDER`: folds an adapter into its base, in float32."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def merge(adapter: Path, target: Path) -> None:
    """Writes a folder that plain transformers loads: weights, tokenizer and chat template; whole or absent."""
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftConfig
    from transformers import AutoTokenizer

    from soup.rope import changed

    partial = target.with_name(f".{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    scores = PeftConfig.from_pretrained(adapter).task_type == "SEQ_CLS"
    kind = AutoPeftModelForSequenceClassification if scores else AutoPeftModelForCausalLM
    options = {"num_labels": 1} if scores else {}
    model = kind.from_pretrained(adapter, dtype="float32", **options, **changed(adapter))
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(partial)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(partial)
    os.replace(partial, target)


if __name__ == "__main__":
    merge(Path(sys.argv[1]), Path(sys.argv[2]))
