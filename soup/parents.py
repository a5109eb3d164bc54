"""Which processes of this machine run a sweep: written down so that `soup cancel` finds them, and no other."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soup.record import read_json
from soup.sweep import Sweep, update

WAIT_S = 20.0


@contextmanager
def registered(sweep: Sweep) -> Iterator[None]:
    """This process is one that runs the sweep."""
    own = _identity(os.getpid())
    update(sweep, "local.json", lambda found: [*_alive(found), own])
    try:
        yield
    finally:
        update(sweep, "local.json", lambda found: [one for one in _alive(found) if one != own])


def alive(sweep: Sweep) -> list[dict[str, Any]]:
    """The processes that run the sweep: pid, started (clock ticks after boot), boot, host. Those of other hosts too."""
    return _alive(read_json(sweep.local))


def stop(sweep: Sweep, say: Callable[[str], None]) -> int:
    """Asks all of them to stop, and waits a while; returns 0 where none is left."""
    there = alive(sweep)
    if not there:
        say(f"nothing runs sweep {sweep.id}")
        return 0
    for one in there:
        if one["host"] != socket.gethostname():
            say(f"process {one['pid']} runs it on {one['host']}: cancel it there")
            continue
        try:
            descriptor = os.pidfd_open(one["pid"])
        except ProcessLookupError:
            continue
        try:
            if _identity(one["pid"]) == one:  # asked once its pid can no longer become another's
                signal.pidfd_send_signal(descriptor, signal.SIGTERM)
                say(f"asked process {one['pid']} to stop; its runs save at their next step")
        except ProcessLookupError:
            continue
        finally:
            os.close(descriptor)
    end = time.monotonic() + WAIT_S
    while (left := alive(sweep)) and time.monotonic() < end:
        time.sleep(0.1)
    say(
        "stopped; `soup retry` goes on"
        if not left
        else "it has not stopped yet; `soup status` shows when it has"
    )
    return int(bool(left))


def _alive(found: Any) -> list[dict[str, Any]]:
    host = socket.gethostname()
    return [one for one in found or [] if one["host"] != host or _identity(one["pid"]) == one]


def _identity(pid: int) -> dict[str, Any] | None:
    """What no other process has, now or later (proc(5)); `None` where there is none, or only its corpse."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    if fields[0] in "ZX":
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"pid": pid, "started": int(fields[19]), "boot": boot, "host": socket.gethostname()}
