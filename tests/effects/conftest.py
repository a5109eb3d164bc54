"""What `prove` finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def wrong() -> Callable[[Any], dict[str, Any]]:
    """The effects that `prove` finds not to be in force, by key."""

    def mismatches(built: Any) -> dict[str, Any]:
        from soup import effects

        return {effect.key: effect for effect in effects.prove(built) if not effect.ok}

    return mismatches
