"""What Unsloth put in place: patches of the libraries, and forward functions."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from soup.effects import Effect
from soup.effects.model import forward_owner
from soup.model.unsloth import PATCHED


def patches(built: Any) -> Iterator[Effect]:
    """Whether it came before the libraries that it patches, and how much of the trainer is its own code."""
    names = list(sys.modules)  # in the order in which they were ready: a package after what it imports
    first = next((place for place, name in enumerate(names) if name.startswith("unsloth.")), len(names))
    late = [name for name in PATCHED if names.index(name) < first]
    own = [
        name
        for kind in type(built.trainer).__mro__
        for name, function in vars(kind).items()
        if "unsloth" in getattr(function, "__globals__", {}).get("__name__", "").lower()
    ]
    asked = built.config.tree["backend"]["name"]
    how = (
        f"imported before {', '.join(PATCHED)}; its code is in the trainer's {', '.join(own) or 'no method'}"
    )
    if late:
        how = f"{', '.join(late)} came before unsloth, which patches them"
    ok = bool(own) and not late
    yield Effect("backend.name", asked, "unsloth" if ok else "transformers", ok, how)


def kernels(built: Any) -> Iterator[Effect]:
    """Whose forward functions the modules run: their libraries' own, and Unsloth's; TRL's would hide one of those."""
    owners = Counter(owner for module in built.model.modules() if (owner := forward_owner(module)))
    foreign = sorted(owner for owner in owners if not owner.startswith(("unsloth", "accelerate")))
    found = ", ".join(f"{count} by {owner}" for owner, count in sorted(owners.items()))
    how = f"forward functions replaced: {found or 'none, Unsloth has none for this model here'}"
    effective = ", ".join(foreign) or "auto"
    yield Effect("backend.kernels", built.config.backend.kernels, effective, not foreign, how)
