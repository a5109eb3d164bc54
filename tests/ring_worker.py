"""A process of the tests of ring attention: forked from a server that has imported everything."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path

LARGEST = 4
PRELOAD = ["soup.train.job", "soup.model.ring", "soup.train.ring", "trl", "tests.ring_worker"]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def join(rank, size, port):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    if size > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=600))


def answer(function, rank, size, port, pipe, given):
    """One question, in a process of its own."""
    import traceback

    try:
        join(rank, size, port)
        pipe.send((True, globals()[function](**given)))
    except BaseException:  # noqa: BLE001, what went wrong is told by who asked
        pipe.send((False, traceback.format_exc()))


def serve(rank, port, pipe):
    """Questions about attention, one after another."""
    import torch.distributed as dist

    join(rank, LARGEST, port)
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


def build(tree, folder):
    from soup import device, schema
    from soup.model import source
    from soup.train.build import build

    config = schema.check(tree)
    where = source.folder(config.model)
    return build(config, device=device.resolve("cpu"), model_folder=where, output=Path(folder))


def train(*, tree, folder):
    """What is logged, and the effects that are not in force."""
    from soup import effects

    built = build(tree, folder)
    wrong = {one.key: one.how for one in effects.prove(built) if not one.ok}
    built.trainer.metrics_file = Path(folder) / "metrics.jsonl"
    built.trainer.train()
    return built.trainer.state.log_history, wrong


def prove(*, tree, folder, sabotage):
    """The effects that are not in force after `sabotage`, a function of tests.ring_sabotage."""
    from soup import effects
    from tests import ring_sabotage

    spoil = getattr(ring_sabotage, sabotage)()
    built = build(tree, folder)
    if spoil is not None:
        spoil(built)
    return {one.key: one.how for one in effects.prove(built) if not one.ok}
