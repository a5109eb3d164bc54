"""How long `soup --cfg job` and `soup plan` take to answer, beside a minimal Hydra application's `--cfg job`.

    .venv/bin/python bench/startup.py [ROUNDS]

Prints the median wall time of each in seconds, rounds alternating so that a busy machine slows all alike, and
the ratio to the minimal application. Status 1 where a ratio is above LIMIT.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

LIMIT = 3.0
CHECKOUT = Path(__file__).resolve().parents[1]
MINIMAL = """\
import hydra


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(cfg):
    pass


main()
"""


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    with TemporaryDirectory() as folder:
        app = Path(folder) / "app.py"
        app.write_text(MINIMAL)
        (app.parent / "conf").mkdir()
        (app.parent / "conf" / "config.yaml").write_text("lr: 1.0e-4\n")
        commands = {
            "minimal --cfg job": [sys.executable, str(app), "--cfg", "job"],
            "soup --cfg job": [sys.executable, "-m", "soup", "--cfg", "job"],
            "soup plan": [sys.executable, "-m", "soup", "plan"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds + 1):
            for name, command in commands.items():
                begin = time.perf_counter()
                subprocess.run(command, cwd=CHECKOUT, check=True, stdout=subprocess.DEVNULL)
                seconds[name].append(time.perf_counter() - begin)
    medians = {
        name: median(taken[1:]) for name, taken in seconds.items()
    }  # the first round fills disk caches
    base = medians["minimal --cfg job"]
    for name, taken in medians.items():
        print(f"{name:18} {taken:6.3f} s   {taken / base:4.2f} x minimal")
    return int(max(medians.values()) > LIMIT * base)


if __name__ == "__main__":
    sys.exit(main())
