"""A process of the ring tests: waits for questions, answers them together with the others."""

from __future__ import annotations

import os
from datetime import timedelta

LARGEST = 4


def serve(rank, port, pipe):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=LARGEST, timeout=timedelta(seconds=60))
    groups = {size: dist.new_group(list(range(size))) for size in range(2, LARGEST + 1)}
    while (asked := pipe.recv()) is not None:
        function, size, given = asked
        if rank < size:
            pipe.send(globals()[function](rank, size, groups.get(size), **given))


def tensors(seed, q_shape, k_shape, v_width, dtype):
    """q, k, v and the gradient of the output, of a whole row."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    v_shape = (*k_shape[:3], v_width)
    return draw(*q_shape), draw(*k_shape), draw(*v_shape), draw(*q_shape[:3], v_width)


def attention(rank, size, group, *, seed, q_shape, k_shape, v_width, dtype, starts, layout, kernel=None):
    """Positions of the own part, its output, and the gradients of its q, k and v."""
    import torch

    from soup.model import ring, ring_kernels

    place = ring.Ring(size, rank, group, layout)
    cut = ring.Cut(place, q_shape[2], starts)
    at = torch.tensor(cut.positions)
    q, k, v, grad = (
        t[:, :, at].contiguous() for t in tensors(seed, q_shape, k_shape, v_width, getattr(torch, dtype))
    )
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    real = ring_kernels.kernel
    if kernel is not None:
        ring_kernels.kernel = lambda _: kernel
    try:
        out = ring.attend(q, k, v, cut, q_shape[3] ** -0.5)
        out.backward(grad)
    finally:
        ring_kernels.kernel = real
    return cut.positions, [t.detach().float().numpy() for t in (out, q.grad, k.grad, v.grad)]
