"""Ring attention over real processes, against attention to the whole row by its definition."""

from __future__ import annotations

import random

import pytest

from soup import ring

SHAPES = random.Random(5)


@pytest.fixture(scope="session")
def ask(forkserver):
    """`ask("attention", 3, ...)`: what each of three processes answers. Four are started once."""
    from tests import ring_worker

    port = ring_worker.free_port()
    pipes, processes = [], []
    for rank in range(ring_worker.LARGEST):
        ours, theirs = forkserver.Pipe()
        process = forkserver.Process(target=ring_worker.serve, args=(rank, port, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)

    def asked(function, size, **given):
        for pipe in pipes[:size]:
            pipe.send((function, size, given))
        for pipe in pipes[:size]:
            assert pipe.poll(60), "no answer"
        return [pipe.recv() for pipe in pipes[:size]]

    yield asked
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join(10)


def whole(seed, q_shape, k_shape, v_width, dtype, starts):
    """Output and gradients by the definition, in float64."""
    import torch

    from tests import ring_worker

    given = ring_worker.tensors(seed, q_shape, k_shape, v_width, getattr(torch, dtype))
    q, k, v, grad = (t.double() for t in given)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    position_T = torch.arange(q_shape[2])
    document_T = torch.bucketize(position_T, torch.tensor(starts), right=True)
    seen_TT = (position_T[:, None] >= position_T) & (document_T[:, None] == document_T)
    times = q_shape[1] // k_shape[1]
    scores = q @ k.repeat_interleave(times, 1).mT * q_shape[3] ** -0.5
    out = scores.masked_fill(~seen_TT, float("-inf")).softmax(-1) @ v.repeat_interleave(times, 1)
    out.backward(grad)
    return [t.detach() for t in (out, q.grad, k.grad, v.grad)]


def farthest(answers, wanted):
    """The largest difference of output and gradients, over the largest value of each."""
    import torch

    seen = sorted(position for positions, _ in answers for position in positions)
    assert seen == list(range(wanted[0].shape[2]))
    worst = 0.0
    for number, right in enumerate(wanted):
        for positions, found in answers:
            off = (torch.from_numpy(found[number]) - right[:, :, positions]).abs().max()
            scale = right.abs().max()  # nothing of q's and k's gradients, where each token is alone
            worst = max(worst, float(off / scale if scale > 1e-9 else off))
    return worst


CASES = {
    "plain": {},
    "contiguous": {"layout": "contiguous"},
    "grouped queries": {"heads": 6, "groups": 2},
    "one group": {"heads": 4, "groups": 1, "batch": 1},
    "documents": {"batch": 1, "starts": (0, 3, 4, 21, 40)},
    "documents, contiguous": {"batch": 1, "starts": (0, 3, 4, 21, 40), "layout": "contiguous"},
    "a document of each token": {"batch": 1, "starts": tuple(range(48))},
    "narrow values": {"v_width": 4},
    "a kernel of torch's functions": {"kernel": "plain", "heads": 6, "groups": 2},
}


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_it_is_attention_to_the_whole_row(ask, size, case):
    row = {"batch": 2, "heads": 4, "groups": 4, "starts": (0,), "layout": "zigzag", "v_width": 8} | case
    given = {
        "seed": size,
        "q_shape": (row["batch"], row["heads"], 48, 8),
        "k_shape": (row["batch"], row["groups"], 48, 8),
        "v_width": row["v_width"],
        "dtype": "float32",
        "starts": row["starts"],
    }
    answers = ask("attention", size, **given, layout=row["layout"], kernel=row.get("kernel"))
    assert farthest(answers, whole(**given)) < 2e-6


@pytest.mark.parametrize("number", range(12))
def test_random_shapes(ask, number):
    size, layout = SHAPES.choice([2, 3, 4]), SHAPES.choice(ring.LAYOUTS)
    groups, times, width = SHAPES.randint(1, 3), SHAPES.randint(1, 3), SHAPES.choice([4, 10, 16, 33])
    length = SHAPES.randint(1, 40) * ring.multiple(size, layout)
    starts = (0, *sorted(SHAPES.sample(range(1, length), SHAPES.randint(0, min(6, length - 1)))))
    dtype = SHAPES.choice(["float32", "float32", "bfloat16"])
    given = {
        "seed": number,
        "q_shape": (1, groups * times, length, width),
        "k_shape": (1, groups, length, width),
        "v_width": width,
        "dtype": dtype,
        "starts": starts,
    }
    answers = ask("attention", size, **given, layout=layout)
    assert farthest(answers, whole(**given)) < (5e-6 if dtype == "float32" else 3e-2)


@pytest.mark.parametrize("layout", ring.LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_every_pair_is_computed_once_and_no_other(layout, size):
    """By counting, without processes; of zigzag's processes none has more to do than another."""
    chosen = random.Random(size)
    for documents in (0, 5):
        length = 6 * ring.multiple(size, layout)
        starts = [0, *sorted(chosen.sample(range(1, length), documents))]
        work = []
        pairs = set()
        for rank in range(size):
            positions = [p for stretch in ring.part(length, size, rank, layout) for p in stretch]
            done = 0
            for owner in range(size):
                theirs = [p for stretch in ring.part(length, size, owner, layout) for p in stretch]
                for block in ring.blocks(length, starts, size, rank, owner, layout):
                    for q in block.q:
                        for k in (
                            block.k
                            if not block.causal
                            else range(block.k.start, q - block.q.start + block.k.start + 1)
                        ):
                            pair = positions[q], theirs[k]
                            assert pair not in pairs
                            pairs.add(pair)
                            done += 1
            work.append(done)
        document = {p: sum(start <= p for start in starts) for p in range(length)}
        assert pairs == {(q, k) for q in range(length) for k in range(q + 1) if document[q] == document[k]}
        if layout == "zigzag" and not documents:
            assert len(set(work)) == 1
