"""`python -m soup.model.convert FILE.gguf FOLDER`: dequantizes a GGUF once, to bfloat16 safetensors."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def convert(gguf: Path, target: Path) -> None:
    """Writes model and tokenizer as transformers loads them, and manifest.json: file to [bytes, sha256]."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from soup.model.source import sha256

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    del model.config.quantization_config, model.hf_quantizer  # the weights are plain now
    # transformers 5.17 reads eos from the wrong GGUF field (it says <|im_start|>); the model's ids are right
    for kind in ("bos", "eos", "pad"):
        token_id = getattr(model.config, f"{kind}_token_id")
        setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(token_id))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    files = sorted(path for path in target.iterdir() if path.is_file())
    manifest = {path.name: [path.stat().st_size, sha256(path)] for path in files}
    (target / "manifest.json").write_text(json.dumps(manifest, indent=1))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
