"""`soup report [RUN|SWEEP ...] [--out FILE]`: runs on one page that needs nothing else, and as one picture."""

from __future__ import annotations

from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

from soup.cli.table import size
from soup.errors import Problem, Refused
from soup.report import PACKAGES

SUFFIX = ".html"


def report(words: list[str], args: Namespace) -> int:
    """Writes FILE.html and FILE.png, by default `<run.root>/reports/<id>`, and says where they are.

    Raises:
        Refused: a word names no run or sweep; a package of the extra `report` is missing;
            a file that cannot be written.
    """
    from soup.report.chosen import choose

    missing = [package for package, module in PACKAGES.items() if find_spec(module) is None]
    if missing:
        why = f"needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
        raise Refused(Problem(key="report", why=why, fix="pip install 'soup-launcher[report]'"))
    root = Path(args.run_root).absolute()
    chosen = choose(root, words)
    target = _target(args.out, root / "reports" / f"{chosen.name}{SUFFIX}")

    from soup.report import page, picture
    from soup.report.content import gather

    content = gather(chosen)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(target, error.strerror) from error
    count = page.write(content, target)
    png = target.with_suffix(".png")
    picture.write(content, png)
    counts = ", ".join(f"{number} {state}" for state, number in content.counts.items())
    print(f"{content.title}: {counts}")
    print(f"page     {target} ({size(count)})")
    print(f"picture  {png} ({size(png.stat().st_size)})")
    return 0


def _target(out: str | None, default: Path) -> Path:
    if out is None:
        return default
    path = Path(out).absolute()
    if path.suffix != SUFFIX:
        fix = f"--out {path.with_suffix(SUFFIX).name}"
        raise Refused(Problem(key="--out", value=out, why="is the page, an .html file", fix=fix))
    return path


def _unwritable(path: Path, why: str | None) -> Refused:
    return Refused(
        Problem(key="--out", value=str(path), why=f"cannot be written: {why}", fix="--out FILE.html")
    )
