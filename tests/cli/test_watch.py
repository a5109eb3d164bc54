"""`soup status --watch` in a terminal of its own: what it draws at 80 columns, without colour, and on a dumb one."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock
from rich.console import Console

from soup import sweep
from soup.cli import watch
from soup.record import write_json
from soup.sweep import SweepPoint

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
LONG = "ValueError: the rows of this file have neither messages nor a prompt, and " + "so on " * 40


@pytest.fixture
def running(tmp_path):
    """A sweep of three: one finished, one failed, one that runs while the lock is held."""
    points = [
        SweepPoint(
            run=f"{name:0<12}",
            overrides=(f"lora.r={number}", "optim.lr=1e-4", "data.train=a-long-name.jsonl"),
        )
        for number, name in enumerate(("done", "bad", "run"))
    ]
    made = sweep.record(
        tmp_path,
        command=[],
        settings={"name": "local", "wait": True, "slots": 1},
        objective="eval_loss",
        points=points,
    )
    done, bad, run = (made.run(point) for point in points)
    for one in (done, bad, run):
        one.folder.mkdir()
        write_json(one.environment, {})
        one.metrics.write_text('{"step": 10, "loss": 1.0, "eval_loss": 1.5, "steps": 40}\n')
    done.finish("finished", step=40, steps=40, eval_loss=0.75)
    bad.finish("failed", error=LONG)
    return tmp_path, run


class Terminal:
    """A command in a pty of 80 by 24; `said` is all that it wrote."""

    def __init__(self, *words, rows=24, columns=80, **environment):
        import fcntl
        import struct
        import termios

        self.fd, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        clean = {
            key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES")
        }
        clean |= {"TERM": "xterm-256color"} | environment
        command = [sys.executable, "-m", "soup", *words]
        self.process = subprocess.Popen(
            command,
            stdin=child,
            stdout=child,
            stderr=child,
            env=clean,
            # as a terminal has it, though these tests run in a background that ignores Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(child)
        self.said = ""

    def read(self, until, timeout_s=60):
        end = time.monotonic() + timeout_s
        while not until(self.said):
            assert time.monotonic() < end, self.said
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.said += os.read(self.fd, 65536).decode()
                except OSError:  # closed on the other side
                    break
        return self.said

    def end(self):
        self.read(lambda _: False, timeout_s=30)
        return self.process.wait(timeout=30)


def drawn(said):
    """The lines of the first frame."""
    frame = next(frame for frame in said.split("\x1b[H") if "sweep" in frame)
    return [CONTROL.sub("", COLOUR.sub("", line)).rstrip() for line in frame.split("\n")]


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}], ids=["colour", "no colour"])
def test_a_sweep_at_80_columns_until_it_ends(running, environment):
    root, run = running
    with FileLock(run.lock_file):
        terminal = Terminal("status", "--watch", f"run.root={root}", **environment)
        said = terminal.read(lambda said: "Ctrl-C stops watching" in said)
    lines = drawn(said)
    assert max(map(len, lines)) <= 80 and len(lines) <= 24, lines
    text = "\n".join(lines)
    assert "1 finished  1 failed  1 running" in text and "1 of 3 points done" in text
    assert re.search(r"3 +r=2 lr=1e-4 .*running +10/40", text)
    assert "ValueError: the rows of this file" in text and "…" in text
    colours = {code for code in COLOUR.findall(said) if re.search(r"[\[;](3|4|9)\d", code)}
    assert bool(colours) == (not environment), colours
    assert terminal.end() == 0
    after = terminal.said.rpartition("\x1b[?1049l")[2]  # the terminal is as it was, with the last state below
    assert "1 finished, 1 failed, 1 interrupted" in after and "\x1b" not in after.replace("\x1b[?25h", "")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["dumb", "pipe"])
def test_what_cannot_be_drawn_over_gets_lines_when_something_changes(running, way):
    root, run = running
    words = ("status", "--watch", f"run.root={root}")
    with FileLock(run.lock_file):
        if way == "dumb":
            terminal = Terminal(*words, TERM="dumb")
            terminal.read(lambda said: "LONG" in said or "so on" in said)
            time.sleep(4.5)
        else:
            pipe = subprocess.Popen([sys.executable, "-m", "soup", *words], stdout=subprocess.PIPE, text=True)
            time.sleep(6)
    said = pipe.communicate(timeout=60)[0] if way == "pipe" else (terminal.end(), terminal.said)[1]
    assert "\x1b" not in said
    assert said.count("1 running") == 1 and said.count("1 interrupted") == 1


@pytest.mark.slow
def test_ctrl_c_stops_watching(running):
    root, run = running
    with FileLock(run.lock_file):
        terminal = Terminal("status", "--watch", f"run.root={root}")
        terminal.read(lambda said: "Ctrl-C stops watching" in said)
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 130
    assert "Traceback" not in terminal.said and "\x1b[?1049l" in terminal.said, "the first screen is back"


@pytest.mark.parametrize(("width", "height"), [(40, 10), (80, 24), (120, 50)])
@pytest.mark.parametrize("count", [1, 12, 500])
def test_a_view_fits_any_terminal(width, height, count):
    states = ["running", "failed", "finished", "waiting"]
    points = [
        {"number": n + 1, "point": f"[red]lora.r={n} optim.lr=1e-4", "run": "0" * 12, "state": states[n % 4]}
        | ({"step": 3, "steps": 40, "eval_loss": 1.23456789} if n % 4 != 3 else {})
        | ({"error": LONG} if n % 4 == 1 else {})
        for n in range(count)
    ]
    counts = {state: sum(one["state"] == state for one in points) for state in states}
    found = {
        "id": "0123456789ab",
        "launch": "local",
        "objective": "eval_loss",
        "processes": [],
        "silent": None,
    }
    found |= {"counts": counts, "points": points, "left_out": 0}
    console = Console(width=width, height=height, force_terminal=True)
    with console.capture() as captured:
        console.print(watch.view(found, width, height))
    lines = CONTROL.sub("", COLOUR.sub("", captured.get())).splitlines()
    assert len(lines) <= height and max(map(len, lines)) <= width
    assert any("running" in line and "3/40" in line for line in lines)
    assert width < 80 or ("[red]lora.r=0" if width == 120 else " r=0 lr=1e-4 ") in "\n".join(lines), (
        "what a point is called is no markup"
    )
    assert count < 500 or "more points" in "\n".join(lines)


def test_why_points_wait_leaves_room_for_why_others_failed():
    points = [
        {
            "number": 1,
            "point": "lora.r=2",
            "run": "a" * 12,
            "state": "failed",
            "error": "ValueError: it broke",
        }
    ]
    points += [
        {
            "number": n,
            "point": f"lora.r={n}",
            "run": f"{n}" * 12,
            "state": "queued",
            "error": "job 1: Priority",
        }
        for n in range(2, 7)
    ]
    found = {"id": "b" * 12, "launch": "slurm", "objective": "eval_loss", "processes": [], "silent": None}
    for shown, said, style in (
        (points, "1 ValueError: it broke", "31"),
        (points[1:], "6 job 1: Priority", "2"),
    ):
        counts = {"queued": 5, "failed": len(shown) - 5}
        console = Console(width=80, force_terminal=True, color_system="standard")
        with console.capture() as drawn:
            console.print(watch.view(found | {"points": shown, "left_out": 0, "counts": counts}, 80, 24))
        assert f"\x1b[{style}m{said}" in drawn.get()
