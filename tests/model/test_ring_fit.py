"""What a config.json shows to be impossible in a ring, before transformers is loaded."""

from __future__ import annotations

import pytest

from soup.model.ring_fit import OWN, obstacle


@pytest.mark.parametrize("kind", [*sorted(OWN), "llama", "gpt_neox", "opt"])
def test_attention_of_its_own_is_known_as_the_class_has_it(kind):
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    takes_any = getattr(getattr(transformers, NAMES[kind]), "_supports_attention_backend", False)
    found = obstacle({"model_type": kind}, 64)
    assert (found is None) == takes_any
    if found is not None:
        assert "interface" in found[0]
    assert obstacle({"model_type": kind, "auto_map": {"AutoModelForCausalLM": "own.Own"}}, 64) is None
