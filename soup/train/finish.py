"""The model folder that a run leaves: loads with plain transformers or PEFT, and says how it came to be."""

from __future__ import annotations

import os
import shutil
from typing import Any

from soup.model import source
from soup.model.rope import differing
from soup.record import Run, write_json
from soup.rope import BASE_CONFIG, Scaling, scaling
from soup.schema import Config
from soup.train import ranks
from soup.train.build import Built

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 512)  # of those that its --max-lora-rank takes


def save_model(run: Run, built: Built, final: dict[str, Any]) -> None:
    """Adapter or weights, tokenizer, chat template and model card, whole or absent."""
    if callable(getattr(built.trainer.optimizer, "eval", None)):
        built.trainer.optimizer.eval()  # schedule-free: the averaged weights
    partial = run.folder / ".model"
    if ranks.first():
        shutil.rmtree(partial, ignore_errors=True)
    ranks.barrier()
    built.trainer.save_model(str(partial))
    ranks.barrier()
    if not ranks.first():
        return
    built.tokenizer.save_pretrained(partial)
    (partial / "training_args.bin").unlink(
        missing_ok=True
    )  # a pickle of local paths; config.yaml says it all
    stretched = scaling(built.config, source.config(built.model_folder))
    if (
        stretched is not None and built.config.lora.r is not None
    ):  # the base's own config.json knows nothing of it
        write_json(partial / BASE_CONFIG, differing(built.model.config.get_text_config()))
    (partial / "README.md").write_text(_card(run, built, final, stretched), encoding="utf-8")
    shutil.rmtree(run.model, ignore_errors=True)
    os.replace(partial, run.model)


def _card(run: Run, built: Built, final: dict[str, Any], stretched: Scaling | None) -> str:
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
    load = f"from {data.library_name} import {loader}\n\n"
    words = '"FOLDER"' + (", num_labels=1" if scores else "")
    if adapter and stretched is not None:
        load = f"import json\nfrom pathlib import Path\n\n{load}"
        load += f'scaled = json.loads(Path("FOLDER/{BASE_CONFIG}").read_text())\n'
        words += ", **scaled"
    load += f"model = {loader}.from_pretrained({words})"
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

{_serving(config, scores, stretched)}{_context(stretched, adapter)}## Results

{metrics}

## Configuration

```yaml
{run.config.read_text(encoding="utf-8").strip()}
```
"""
    return str(ModelCard(content))


def _serving(config: Config, scores: bool, stretched: Scaling | None) -> str:
    """How vLLM serves it, or why it needs the adapter folded in for that."""
    if scores:
        return ""
    if config.lora.r is None:
        return "With vLLM: `vllm serve FOLDER`.\n\n"
    merged = (
        "`soup runs export --merged` folds the adapter in, and `vllm serve FOLDER` takes that: vLLM serves no"
    )
    if config.lora.use_dora:
        return f"{merged} DoRA.\n\n"
    if config.training.moe_lora:
        return f"{merged} adapters on fused experts.\n\n"
    if stretched is not None:
        return f"{merged} other context beside an adapter than its base's.\n\n"
    base = config.model.base if not config.model.embedded else "HuggingFaceTB/SmolLM2-135M-Instruct"
    rank = next((rank for rank in VLLM_RANKS if rank >= (config.lora.r or 0)), None)
    if rank is None:
        return f"{merged} rank above {VLLM_RANKS[-1]}.\n\n"
    words = f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned=FOLDER"
    if config.model.chat_template is not None:  # it would take the base's
        words += " --chat-template FOLDER/chat_template.jinja"
    return (
        f"With transformers alone, once `soup runs export --merged` has folded the adapter in:\n\n```python\n"
        f"from transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("MERGED")\n```\n\nWith vLLM: `{words}`.\n\n'
    )


def _context(stretched: Scaling | None, adapter: bool) -> str:
    """What a user must know of a stretched context."""
    if stretched is None:
        return ""
    where = (
        f"`{BASE_CONFIG}`, beside the adapter: its base is to be loaded with it, as above"
        if adapter
        else "`config.json`"
    )
    return f"""## Context

Trained with {stretched.kind} rotary scaling by {stretched.factor:g}, from {stretched.own} to {stretched.length} tokens.
The scaling is in {where}.

"""
