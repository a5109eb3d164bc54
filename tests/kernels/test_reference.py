"""Each kernel against the formula written out with torch's own operations and autograd, in float32."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy as reference_loss

from soup.kernels import attention, gate, lora, norm, prefixes
from soup.kernels.logps import log_probabilities
from soup.kernels.loss import CHUNK, cross_entropy

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(value, *inputs):
    return torch.autograd.grad(
        value, inputs, torch.randn(value.shape, generator=torch.Generator().manual_seed(9))
    )


def off(ours, wanted):
    """Mean error of a tensor, as a share of its mean size."""
    return float((ours.float() - wanted).abs().mean() / wanted.abs().mean())


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "runs",  # of tokens: the first position, and the end
    [
        [(0, 7)],
        [(0, 1), (0, 2), (0, 9)],
        [(0, 300), (0, 4), (0, 260)],
        [(0, 9), (4, 12), (11, 13), (2, 5), (0, 6), (5, 6)],
        [(0, 30), (20, 420), (100, 101), (15, 280)],
    ],
)
def test_attention_of_documents(runs, dtype, window):
    places = torch.cat([torch.arange(*run) for run in runs])
    tokens, heads, kept, width = len(places), 6, 2, 8
    q, k, v = (drawn(1, tokens, n, width, seed=n).transpose(1, 2) for n in (heads, kept, kept))
    q, k, v = (one.detach().to(dtype).requires_grad_() for one in (q, k, v))
    out, _ = attention.attend(None, q, k, v, None, position_ids=places[None], sliding_window=window)
    ours = gradients(out, q, k, v)
    q, k, v = (one.detach().float().requires_grad_() for one in (q, k, v))

    seen, path = torch.zeros(tokens, tokens, dtype=torch.bool), []
    for index, place in enumerate(places.tolist()):
        path = [*path[:place], index]
        seen[index, path[-(window or tokens) :]] = True
    scores = q @ k.repeat_interleave(heads // kept, 1).transpose(2, 3) * width**-0.5
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    wanted = (p @ v.repeat_interleave(heads // kept, 1)).transpose(1, 2)
    theirs = gradients(wanted, q, k, v)
    if dtype is torch.bfloat16:
        assert off(out, wanted) < 3e-3  # with scores in bfloat16 5e-3
        assert all(off(*pair) < 2e-2 for pair in zip(ours, theirs, strict=True))
        return
    torch.testing.assert_close(out, wanted, **CLOSE)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained_head", [True, False])
@pytest.mark.parametrize("tokens", [5, CHUNK + 19])
def test_loss_of_hidden_states(tokens, trained_head):
    hidden, head = drawn(tokens, 16), drawn(50, 16, seed=1)
    label = torch.randint(0, 50, (tokens,), generator=torch.Generator().manual_seed(2))
    label[::3] = -100
    inputs = (hidden, head) if trained_head else (hidden,)
    place = torch.randint(0, tokens, (tokens,), generator=torch.Generator().manual_seed(3))
    loss, correct, entropy, learnt = cross_entropy(
        hidden, head if trained_head else head.detach(), place, label, 2 * tokens
    )
    logits = hidden[place] @ head.T
    wanted = reference_loss(logits, label, reduction="sum") / (2 * tokens)
    torch.testing.assert_close(loss, wanted, **CLOSE)
    for ours, theirs in zip(gradients(loss, *inputs), gradients(wanted, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    taught = label != -100
    p = logits[taught].softmax(-1)
    assert learnt == taught.sum() and correct == (p.argmax(-1) == label[taught]).sum()
    torch.testing.assert_close(entropy, -(p * p.log()).sum(), **CLOSE)
    assert cross_entropy(hidden, head, place, label, None)[0].item() == pytest.approx(
        float(wanted.detach() * 2 * tokens / learnt)
    )


def test_a_batch_without_labels_has_no_gradient():
    hidden = drawn(4, 16)
    loss, *_ = cross_entropy(hidden, drawn(50, 16), torch.arange(4), torch.full((4,), -100), None)
    assert loss == 0 and not gradients(loss, hidden)[0].any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapted_layer(bias, dtype):
    x = drawn(2, 9, 24).detach().to(dtype).requires_grad_()
    weight = drawn(40, 24, seed=1).detach().to(dtype)
    offset = drawn(40, seed=4).detach().to(dtype) if bias else None
    a, b = drawn(4, 24, seed=2), drawn(40, 4, seed=3)
    y = lora.linear(x, weight, offset, a, b, 0.5)
    wanted = torch.nn.functional.linear(x.float(), weight.float(), None if offset is None else offset.float())
    wanted = wanted + 0.5 * (x.float() @ a.T) @ b.T
    close = CLOSE if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.3}
    torch.testing.assert_close(y.float(), wanted, **close)
    inputs = (x, a, b)
    for ours, theirs in zip(gradients(y.float(), *inputs), gradients(wanted, *inputs), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(
            ours.float(), theirs.float(), **close | {"atol": 1e-5 if dtype is torch.float32 else 1}
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm(dtype):
    x, weight = (
        drawn(*shape, seed=n).detach().to(dtype).requires_grad_()
        for n, shape in enumerate([(2, 9, 24), (24,)])
    )
    y = norm.normalised(x, weight, 1e-5)
    wide, scale = x.float(), weight.float()
    wanted = scale * wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    close = CLOSE if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.05}
    assert y.dtype is dtype
    torch.testing.assert_close(y.float(), wanted, **close)
    for ours, theirs in zip(gradients(y.float(), x, weight), gradients(wanted, x, weight), strict=True):
        torch.testing.assert_close(ours, theirs, **close)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_product_of_a_gated_mlp(bias, adapted, dtype):
    gates, ups = (drawn(2, 9, 40, seed=n).detach().to(dtype).requires_grad_() for n in (1, 2))
    weight = drawn(24, 40, seed=3).detach().to(dtype).requires_grad_(not adapted)
    offset = drawn(24, seed=4).detach().to(dtype) if bias else None
    a, b = (drawn(4, 40, seed=5), drawn(24, 4, seed=6)) if adapted else (None, None)
    y = gate.gated_linear(gates, ups, weight, offset, a, b, 0.5)
    h = torch.nn.functional.silu(gates.float()) * ups.float()
    wanted = torch.nn.functional.linear(h, weight.float(), None if offset is None else offset.float())
    if adapted:
        wanted = wanted + 0.5 * (h @ a.T) @ b.T
    close = CLOSE if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.4}
    torch.testing.assert_close(y.float(), wanted, **close)
    inputs = (gates, ups, a, b) if adapted else (gates, ups, weight)
    for ours, theirs in zip(gradients(y.float(), *inputs), gradients(wanted, *inputs), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(
            ours.float(), theirs.float(), **close | {"atol": 1e-5 if dtype is torch.float32 else 2}
        )


@pytest.mark.parametrize("trained_head", [True, False])
@pytest.mark.parametrize("tokens", [0, 5, CHUNK + 19])
def test_log_probabilities_of_labels(tokens, trained_head):
    hidden, head = drawn(tokens, 16), drawn(50, 16, seed=1)
    label = torch.randint(0, 50, (tokens,), generator=torch.Generator().manual_seed(2))
    inputs = (hidden, head) if trained_head else (hidden,)
    found = log_probabilities(hidden, head if trained_head else head.detach(), label)
    logits = hidden @ head.T
    log = logits.log_softmax(-1)
    wanted = log.gather(1, label[:, None])[:, 0]
    torch.testing.assert_close(found.logp_N, wanted, **CLOSE)
    torch.testing.assert_close(found.entropy_N, -(log.exp() * log).sum(-1), **CLOSE)
    torch.testing.assert_close(found.level_N, logits.mean(-1), **CLOSE)
    assert torch.equal(found.right_N, (logits.argmax(-1) == label).float())
    for ours, theirs in zip(gradients(found.logp_N, *inputs), gradients(wanted, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_shared_prefixes_of_documents():
    message, other = [*range(100, 120)], [*range(200, 230)]
    documents = [
        [*message, *other, 1, 2],
        [*message, 5],
        [*message, *other, 1, 3, 4],
        [7, 8],
        [*message, *other, 1, 2],  # the first again
        [*message, *other],  # what others begin with
        [7, 8, 9],  # too little in common with the fourth
    ]
    ids = torch.tensor([token for one in documents for token in one])[None]
    places = torch.cat([torch.arange(len(one)) for one in documents])[None]
    sharing = torch.nn.Identity()
    assert prefixes.merged(sharing, ids, places).ids_1K is ids
    sharing.shares_prefixes = True
    shared = prefixes.merged(sharing, ids, places)
    assert shared.ids_1K[0, shared.place_1T[0]].tolist() == ids[0].tolist()
    assert shared.positions_1K[0, shared.place_1T[0]].tolist() == places[0].tolist()
    assert shared.ids_1K.shape[1] == len(message) + 1 + len(other) + 2 + 2 + 2 + 3
    seen = {}  # of each token that is computed: what it sees, by its path
    for path in attention.paths(shared.positions_1K):
        tokens = [shared.ids_1K[0, part].tolist() for part in (*path.before, path.own)]
        before = sum(tokens[:-1], [])
        for index in range(len(tokens[-1])):
            seen[path.own.start + index] = before + tokens[-1][: index + 1]
    start = 0
    for one in documents:
        for index in range(len(one)):
            assert seen[int(shared.place_1T[0, start + index])] == one[: index + 1]
        start += len(one)
