"""Run folders without training: what a report reads, written by the functions that runs are recorded with."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from soup import record, sweep
from soup.record import Run
from soup.sweep import Sweep, SweepPoint

EVIL = "<script>window.evil=1</script><img src=x onerror=window.evil=2>"
PLANNED = {
    "peak_memory_bytes": 900_000_000,
    "disk_bytes": 10**7,
    "steps": 60,
    "tokens": 30_000,
    "parameters": 10**6,
}


class Folders:
    """`sweep(n)` records a sweep of n points below `root`; every run gets config, plan, metrics and the like."""

    def __init__(self, root: Path, tree: dict[str, Any]):
        self.root, self.tree = root, tree

    def run(
        self,
        name: str,
        *,
        state: str = "finished",
        lines: int = 30,
        goal: float = 2.0,
        seed: int = 0,
        error: str = "ValueError: it broke",
        log: str = "",
        **settings: Any,
    ) -> Run:
        """`settings`: leaves of the configuration, `lora__r=8`."""
        tree = json.loads(json.dumps(self.tree))
        for key, value in settings.items():
            *path, leaf = key.split("__")
            node = tree
            for part in path:
                node = node[part]
            node[leaf] = value
        run = record.place(self.root, name, tree, resume="auto")
        record.write_json(run.plan, PLANNED | {"steps": 2 * lines})
        if state == "new":
            return run
        record.write_json(run.environment, ENVIRONMENT)
        if state != "failed":
            record.write_json(run.effective, effective(tree))
        run.lock_file.touch()
        logged = list(metrics(lines, goal, seed))
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in logged))
        if log:
            (run.folder / "log.txt").write_text(log)
        last: dict[str, Any] = {}
        for line in logged:
            last |= line
        if state in ("finished", "pruned"):
            run.finish(state, **last | {"steps": 2 * lines})
        elif state in ("failed", "diverged"):
            run.finish(
                state, error=error, traceback="Traceback", **{"step": last.get("step", 0), "steps": 2 * lines}
            )
        return run

    def sweep(self, count: int, **options: Any) -> Sweep:
        """Points of a grid over lora.r, optim.lr and optim.scheduler, with a valley at 1e-3 that a larger r deepens."""
        draw = random.Random(count)
        points = []
        for number in range(count):
            r, lr = (2, 4, 8, 16, 32)[number % 5], 10 ** draw.uniform(-5, -1)
            scheduler = ("linear", "cosine", "constant")[number % 3]
            goal = 1.2 + 0.25 * (math.log10(lr) + 3) ** 2 - 0.06 * math.log2(r) + draw.uniform(0, 0.05)
            lr = float(f"{lr:.3g}")
            states = options.get("states", ())
            state = states[number] if number < len(states) else "finished"
            run = self.run(
                f"{number:012x}",
                state=state,
                goal=goal,
                seed=number,
                lines=options.get("lines", 30),
                log="a line\nloading: 10%\rloading: 100%\nValueError: it broke\n"
                if state == "failed"
                else "",
                lora__r=r,
                optim__lr=lr,
                optim__scheduler=scheduler,
            )
            words = (f"lora.r={r}", f"optim.lr={lr}", f"optim.scheduler={scheduler}")
            points.append(SweepPoint(run=run.id, overrides=words, planned=PLANNED))
        return sweep.record(
            self.root,
            command=[
                "--multirun",
                "lora.r=2,4,8,16,32",
                "optim.lr=tag(log,interval(1e-5,1e-1))",
                "sweep.random=5",
            ],
            settings={"name": "local", "wait": True, "slots": 1},
            objective="eval_loss",
            points=points,
            invalid=options.get("invalid", ()),
        )


ENVIRONMENT = {
    "time": "2026-11-25T01:00:00+00:00",
    "host": "here",
    "platform": "Linux",
    "python": "3.11",
    "source": "0123456789abcdef",
    "threads": 1,
    "packages": {"torch": "2.13.0", "trl": "1.12.0", "liger_kernel": "0.8.5"},
}


def metrics(lines: int, goal: float, seed: int) -> Any:
    """A loss that falls to `goal`, as a run logs one, evaluated at every fifth line."""
    draw = random.Random(seed)
    for line in range(1, lines + 1):
        fall = goal + 2.5 * math.exp(-5 * line / lines)
        step, tokens = 2 * line, 1024 * line
        yield {
            "step": step,
            "epoch": step / 44,
            "loss": fall + draw.gauss(0, 0.08),
            "lr": 1e-3 * (1 - line / lines),
            "grad_norm": abs(draw.gauss(0.3, 0.1)),
            "tokens": tokens,
            "tokens_per_s": draw.uniform(900, 1100),
            "peak_memory_bytes": 700_000_000 + seed,
        }
        if line % 5 == 0:
            yield {"step": step, "epoch": step / 44, "eval_loss": fall + 0.02, "eval_runtime": 0.8}


def effective(tree: dict[str, Any]) -> dict[str, Any]:
    from soup.report.point import flat

    found = {
        key: {
            "requested": value,
            "effective": value,
            "ok": True,
            "how": f"read from the {key.partition('.')[0]}",
        }
        for key, value in flat(tree).items()
    }
    found["training.epochs"] |= {"effective": 1.36, "how": "training.max_steps wins"}
    return found


@pytest.fixture(scope="module")
def folders(compose, tmp_path_factory) -> Callable[[], Folders]:
    """`folders()`: a new, empty root for runs of the default configuration."""
    tree = compose("launch.device=cpu")
    return lambda: Folders(tmp_path_factory.mktemp("outputs"), tree)
