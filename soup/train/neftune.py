"""NEFTune (Jain et al. 2023, arXiv:2310.05914): noise on the embeddings of the passes that a model learns from."""

from __future__ import annotations

import math
from typing import Any

import torch


def add_noise(model: Any, alpha: float) -> None:
    """Adds uniform noise within alpha / sqrt(L d) to the input embedding's output, L x d a row, padding included.

    Only passes in training mode that keep gradients have it. transformers' own hook looks at the mode alone, so
    that answers which GRPO generates and the reference's log-probabilities would be noisy as well.
    """

    def noisy(module: Any, _inputs: Any, output_BTD: torch.Tensor) -> torch.Tensor:
        if not (module.training and torch.is_grad_enabled()):
            return output_BTD
        bound = alpha / math.sqrt(output_BTD.shape[1] * output_BTD.shape[2])
        return output_BTD + torch.empty_like(output_BTD).uniform_(-bound, bound)

    model.get_input_embeddings().register_forward_hook(noisy)
