"""The data as the model sees it, on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from soup.data.encode import MASKED, Encoder
from soup.data.prepare import Prepared
from soup.data.report import Report
from soup.data.rows import place

_LIMIT = 4000  # characters of a row that are shown


def show(prepared: Prepared, encoder: Encoder, rows: int, console: Console) -> None:
    """The first `rows` rows with what is learnt marked, then counts, bad rows and the length histogram.

    Learnt text is bold green and the rest dim; where the console has no colour, learnt text stands in ⟦ ⟧.
    """
    coloured = console.color_system is not None and not console.no_color
    if "input_ids" in prepared.columns:
        legend = (
            Text("learnt", style="bold green") + Text(" / not learnt", style="dim")
            if coloured
            else Text("⟦learnt⟧")
        )
        console.print(legend)
    for number, row in enumerate(prepared.first(rows), 1):
        console.rule(Text(f"{prepared.split} {number} of {prepared.report.rows}"), align="left")
        if "input_ids" in row:
            console.print(_tokens(row["input_ids"], row["labels"], encoder, coloured), soft_wrap=True)
            _others(row, ("input_ids", "labels"), console)
        else:
            _sides(row, console)
    console.print(_counts(prepared.report, prepared.split, prepared.stream is not None))
    for bad in prepared.report.bad:
        console.print(Text(f"  {place(bad['source'], bad['line'])}: {bad['why']}"))
    if prepared.report.lengths["histogram"]["counts"]:
        console.print(_histogram(prepared.report))


def _tokens(ids: list[int], labels: list[int], encoder: Encoder, coloured: bool) -> Text:
    """The row's tokens as text, special tokens included, in runs that are learnt or are not."""
    shown = Text()
    done, text = 0, ""
    for learnt, run in groupby(labels, key=lambda label: label != MASKED):
        done += len(list(run))
        # Decoded from the start each time: SentencePiece's decoder drops a space at the start of a text.
        upto = encoder.tokenizer.decode(ids[:done], skip_special_tokens=False)
        part, text = upto[len(text) :], upto
        if len(text) > _LIMIT:
            part = part[: max(0, len(part) - (len(text) - _LIMIT))]
        if coloured:
            shown.append(part, style="bold green" if learnt else "dim")
        else:
            shown.append(f"⟦{part}⟧" if learnt else part)
        if len(text) > _LIMIT:
            shown.append(f" ... {len(ids) - done} more tokens" if len(ids) > done else " ...")
            break
    return shown


def _sides(row: dict[str, Any], console: Console) -> None:
    console.print(Text("prompt", style="bold"))
    console.print(_side(row["prompt"]), soft_wrap=True)
    answers = [name for name in ("chosen", "rejected", "completion") if name in row]
    table = Table(*answers, expand=True, show_lines=False)
    if answers:
        table.add_row(*(_side(row[name]) for name in answers))
        console.print(table)
    _others(row, ("prompt", *answers), console)


def _others(row: dict[str, Any], shown: Sequence[str], console: Console) -> None:
    for name, value in row.items():
        if name not in shown and not name.endswith("_ids"):
            console.print(Text(f"{name}: ", style="bold") + Text(str(value)[:_LIMIT]))


def _side(side: str | list[dict[str, str]]) -> Text:
    text = (
        side if isinstance(side, str) else "\n".join(f"[{turn['role']}] {turn['content']}" for turn in side)
    )
    return Text(text if len(text) <= _LIMIT else text[:_LIMIT] + " ...")


def _counts(report: Report, split: str, stream: bool) -> Table:
    lengths = report.lengths
    table = Table(
        title=Text(
            f"{split}: {report.rows} rows, format {report.format}"
            + (
                ", the first of a stream"
                if stream
                else ", estimated from the first rows"
                if report.sampled
                else ""
            )
        ),
        title_justify="left",
        show_header=False,
        box=None,
    )
    for name, value in (
        *(
            (
                f"of {source['name']}",
                f"{source['rows']}"
                + ("" if stream else f" of {source['read']}")
                + f" rows, format {source['format']}",
            )
            for source in report.sources
            if len(report.sources) > 1
        ),
        (
            "tokens",
            f"{lengths['sum']}, {lengths['sum_labels']} of them learnt"
            if lengths["sum_labels"]
            else str(lengths["sum"]),
        ),
        (
            "length",
            f"mean {lengths['mean']}, half up to {lengths['p50']}, 95% up to {lengths['p95']}, "
            f"max {lengths['max']}, before truncation {lengths['longest']}",
        ),
        ("truncated", str(report.truncated)),
        ("skipped, too long", str(report.skipped)),
        ("dropped, nothing left to learn", str(report.dropped_nothing_left)),
        ("bad rows", str(report.bad_total)),
    ):
        table.add_row(name, value)
    return table


def _histogram(report: Report) -> Table:
    edges, counts = report.lengths["histogram"]["edges"], report.lengths["histogram"]["counts"]
    table = Table("tokens", "rows", "", title=Text("lengths"), title_justify="left", box=None)
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        table.add_row(f"{low:.0f}-{high:.0f}", str(count), Bar(max(counts), 0, count, width=40))
    return table
