"""The model folder that a run leaves: loads with plain transformers or PEFT, and says how it came to be."""

from __future__ import annotations

import os
import shutil
from typing import Any

from soup.record import Run
from soup.train.build import Built


def save_model(run: Run, built: Built, final: dict[str, Any]) -> None:
    """Adapter or weights, tokenizer, chat template and model card, whole or absent."""
    if callable(getattr(built.trainer.optimizer, "eval", None)):
        built.trainer.optimizer.eval()  # schedule-free: the averaged weights
    partial = run.folder / ".model"
    shutil.rmtree(partial, ignore_errors=True)
    built.trainer.save_model(str(partial))
    built.tokenizer.save_pretrained(partial)
    (partial / "training_args.bin").unlink(
        missing_ok=True
    )  # a pickle of local paths; config.yaml says it all
    (partial / "README.md").write_text(_card(run, built, final), encoding="utf-8")
    shutil.rmtree(run.model, ignore_errors=True)
    os.replace(partial, run.model)


def _card(run: Run, built: Built, final: dict[str, Any]) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    config = built.config
    adapter = config.lora.r is not None
    base = config.model.base
    data = ModelCardData(
        base_model=base if not config.model.embedded else "HuggingFaceTB/SmolLM2-135M-Instruct",
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification" if config.task.head == "score" else "text-generation",
        tags=["soup", config.tree["task"]["name"]],
    )
    scores = config.task.head == "score"
    kind = "SequenceClassification" if scores else "CausalLM"
    loader = f"AutoPeftModelFor{kind}" if adapter else f"AutoModelFor{kind}"
    load = (
        f"from {data.library_name} import {loader}\n\n"
        f'model = {loader}.from_pretrained("FOLDER"{", num_labels=1" if scores else ""})'
    )
    metrics = "\n".join(f"- {key}: {value}" for key, value in final.items())
    content = f"""---
{data.to_yaml()}
---

# {config.run.name or run.id}

Fine-tuned from `{base}` by soup (task {config.tree["task"]["name"]}), run `{run.id}`.

## Use

```python
{load}
```

## Results

{metrics}

## Configuration

```yaml
{run.config.read_text(encoding="utf-8").strip()}
```
"""
    return str(ModelCard(content))
