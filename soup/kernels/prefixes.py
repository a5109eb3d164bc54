"""Tokens that documents of a row begin with alike are computed once: a pair's prompt, the template's system message.

In a causal model a token's hidden state depends on the tokens before it and on nothing else, so it is the same in every
document that begins so. Documents are sorted; each gives way, from its beginning, to what it shares with the one before
it, and its positions say where it goes on: of `a b c` and `a b d e` come `a b c d e` at positions 0 1 2 2 3. A position
that does not follow the one before it is a branch off the document before it (`attention.paths`). Gradients of shared
tokens are sums, by autograd, of what all their documents give.
"""

from __future__ import annotations

from itertools import pairwise
from os.path import commonprefix
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soup.plan.unpadded import LEAST


class Merged(NamedTuple):
    """The tokens that are computed, and where in them each token of the whole row is."""

    ids_1K: Tensor
    positions_1K: Tensor
    place_1T: Tensor


def merged(model: Any, ids_1T: Tensor, positions_1T: Tensor) -> Merged:
    """Of documents one after another; all their tokens where the model does not share prefixes (`fast.put_on`)."""
    if not getattr(model, "shares_prefixes", False):
        return Merged(ids_1T, positions_1T, torch.arange(ids_1T.shape[1], device=ids_1T.device)[None])
    return _shared(ids_1T, positions_1T)


def _shared(ids_1T: Tensor, positions_1T: Tensor) -> Merged:
    device, tokens = ids_1T.device, ids_1T.shape[1]
    ids = ids_1T[0].tolist()
    starts = (positions_1T[0] == 0).nonzero()[:, 0].tolist()
    spans = sorted(pairwise([*starts, tokens]), key=lambda span: ids[slice(*span)])
    kept: list[int] = []
    place = [0] * tokens
    before: tuple[int, int] = (0, 0)
    for start, end in spans:
        shared = len(commonprefix([ids[slice(*before)], ids[start:end]]))
        shared = shared if shared >= LEAST else 0
        place[start : start + shared] = place[before[0] : before[0] + shared]
        place[start + shared : end] = range(len(kept), len(kept) + end - start - shared)
        kept += range(start + shared, end)
        before = start, end
    kept_K = torch.tensor(kept, device=device)
    return Merged(ids_1T[:, kept_K], positions_1T[:, kept_K], torch.tensor(place, device=device)[None])
