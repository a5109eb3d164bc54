"""What is installed and could be used: said once, and found in packages' metadata, without importing them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from soup import cache, rules
from soup.cli.check import Checked


def unsloth(ready: Sequence[Checked]) -> str | None:
    """That Unsloth could train these points too, where none of them uses it; the cache remembers that it was said."""
    if not all(_could(one) for one in ready):
        return None
    try:
        installed = version("unsloth")
    except PackageNotFoundError:
        return None
    said = cache.root() / "said" / "unsloth"
    said.parent.mkdir(parents=True, exist_ok=True)
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return None
    return f"hint: Unsloth {installed} is installed and could train this too: backend=unsloth (said once)"


def _could(one: Checked) -> bool:
    """Whether the point, trained otherwise, would break no rule with Unsloth."""
    if one.config.backend.unsloth:
        return False
    facts = rules.facts(one.config, device=one.device.kind, model_config=None) | {"backend": "unsloth"}
    return not rules.broken(facts)
