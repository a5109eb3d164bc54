"""What could go wrong with a ring: each function spoils something in the process that calls it."""

from __future__ import annotations


def nothing():
    """Nothing."""


def attention_stays_local():
    import torch

    from soup.model import ring

    def local(q, k, v, _cut, scale):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True
        )

    ring.attend = local


def parts_are_averaged():
    from soup.model import ring

    def merge(out, lse, part, part_lse):
        first = lse.isinf()[..., None]
        out.copy_(part * first + (out + part) / 2 * ~first)
        lse.copy_(part_lse.logaddexp(lse))

    ring._merge = merge


def gradients_of_keys_stay():
    from soup.model import ring_kernels

    real = ring_kernels.backward

    def backward(*given, **named):
        dq, dk, dv = real(*given, **named)
        return dq, 0 * dk, dv

    ring_kernels.backward = backward


def transformers_drops_the_attention():
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained

    def loaded(*given, **named):
        named.pop("attn_implementation")
        return real(*given, **named)

    AutoModelForCausalLM.from_pretrained = loaded


def rows_stay_whole():
    from soup.train.ring import Parts

    Parts.__call__ = lambda self, examples: dict(self.whole(examples))


def everyone_draws_other_rows():
    from soup.train.ring import Ringed

    def loader(self, *given, **named):
        whole, self.data_collator = self.data_collator, self.parts
        try:
            return super(Ringed, self)._get_dataloader(*given, **named)
        finally:
            self.data_collator = whole

    Ringed._get_dataloader = loader


def another_layout():
    from soup.train import ring

    real = ring.make
    ring.make = lambda size, _layout: real(size, "contiguous")


def a_part_twice():
    from dataclasses import replace

    from soup.model.ring import Cut

    real = Cut.positions.func
    Cut.positions = property(lambda self: real(replace(self, ring=replace(self.ring, rank=0))))
