"""The machines of one run that share its processes: how each finds the first, and learns how the others ended.

What starts the run on each of them says which it is (launchers/_job.py). They share the run's folder: in `.ranks`
the first writes where it listens, and each what ended badly.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soup.errors import Problem, RecordError, Refused
from soup.record import read_json, write_json
from soup.specs import DistributedSpec

MEETING = "meeting.json"
LOOK_S = 0.5  # between looks into a folder that may lie on another machine


@dataclass(frozen=True)
class Node:
    """This machine. `rank`: among the run's, `head`: the first one's address, as the others reach it; `life`: a name of
    this start of the run, which no earlier one had."""

    rank: int
    head: str
    life: str

    def variables(self) -> dict[str, str]:
        """For the environment of the training process, where `here` finds them."""
        return {"SOUP_NODE": str(self.rank), "SOUP_HEAD": self.head, "SOUP_LIFE": self.life}

    @property
    def address(self) -> str:
        """Of this machine, on the way to the first."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.connect((self.head, 9))  # sends nothing
            return one.getsockname()[0]


def here() -> Node | None:
    """`None` where the run is on one machine."""
    if "SOUP_NODE" not in os.environ:
        return None
    return Node(int(os.environ["SOUP_NODE"]), os.environ["SOUP_HEAD"], os.environ["SOUP_LIFE"])


def needed(spread: DistributedSpec) -> None:
    """
    Raises:
        Refused: the run is one of several machines, and nothing started it on them.
    """
    if spread.nodes > 1 and here() is None:
        why = f"this is one machine, and the run's processes are on {spread.nodes}"
        fix = f"launch=slurm trains it; here distributed.nodes=1 distributed.processes={spread.world}"
        raise Refused(Problem(key="distributed.nodes", value=spread.nodes, why=why, fix=fix))


def listen(notes: Path, node: Node) -> tuple[Any, str]:
    """Opens, on the first machine, where the processes meet; returns what keeps it open, and its address."""
    from torch.distributed import TCPStore

    # Shared, within this process, with the agent's own: nobody can take the port in between.
    store = TCPStore(node.head, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    endpoint = f"{node.head}:{store.port}"
    write_json(notes / MEETING, {"life": node.life, "endpoint": endpoint})
    return store, endpoint


def endpoint(notes: Path, node: Node, given_up: Callable[[], bool]) -> str | None:
    """Waits until the first machine listens; returns where, or `None` where it was told to give up."""
    while not given_up():
        if (found := _meeting(notes)).get("life") == node.life:
            return found["endpoint"]
        time.sleep(LOOK_S)
    return None


def until_over(notes: Path, node: Node) -> None:
    """Waits until the first machine has written how the run ended. Where that machine died, SLURM ends this wait."""
    while _meeting(notes).get("life") == node.life:
        time.sleep(LOOK_S)


def failed(notes: Path, node: Node, died: Mapping[int, int]) -> None:
    """Tells the other machines that processes of this one ended badly: their exit status by rank."""
    with suppress(OSError, RecordError):  # the first may be gone, and its folder
        write_json(notes / f"node-{node.rank}.json", {str(rank): status for rank, status in died.items()})


def others(notes: Path, node: Node) -> dict[int, dict[int, int]]:
    """What other machines told so: exit status by rank, by machine."""
    found = {}
    for path in notes.glob("node-*.json"):
        number = int(path.stem.removeprefix("node-"))
        if number != node.rank:
            found[number] = {int(rank): status for rank, status in (read_json(path) or {}).items()}
    return found


def interface(node: Node) -> str | None:
    """The network interface on the way to the first machine, for gloo: a host's own name may be that of loopback."""
    import psutil

    own = node.address
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == own for one in addresses):
            return name
    return None


def _meeting(notes: Path) -> dict[str, Any]:
    return read_json(notes / MEETING) or {}
