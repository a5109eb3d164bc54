"""What a person sees of the data."""

import io

from rich.console import Console

from soup.data.prepare import prepare
from soup.data.show import show


def shown(prepared, encoder, rows=2, **console):
    console = Console(file=io.StringIO(), width=100, **console)
    show(prepared, encoder, rows, console)
    return console.file.getvalue()


def test_learnt_text_is_bracketed_without_colour_and_green_with(arguments, encoder):
    rows = [{"instruction": "Grüße [b]?", "output": "東京 [i] 🙂"}, {"instruction": "a", "output": "b"}]
    made = prepare(**arguments(rows))["train"]
    plain = shown(made, encoder(), rows=1)
    assert "<|im_start|>user\nGrüße [b]?<|im_end|>\n<|im_start|>assistant\n⟦東京 [i] 🙂<|im_end|>\n⟧" in plain
    assert "train 1 of 2" in plain and "train 2 of 2" not in plain
    coloured = shown(made, encoder(), rows=1, force_terminal=True, color_system="standard", no_color=False)
    assert "\x1b[1;32m東京 [i] 🙂<|im_end|>" in coloured and "⟦" not in coloured
    assert "\x1b[2m<|im_start|>system" in coloured


def test_counts_bad_rows_and_histogram(arguments, encoder):
    rows = [{"instruction": "a", "output": "b " * n} for n in range(1, 30)] + [{"instruction": "a"}]
    made = prepare(**arguments(rows, on_bad_row="skip", max_length=60))["train"]
    text = shown(made, encoder(), rows=0)
    report = made.report
    assert f"{report.lengths['sum']}, {report.lengths['sum_labels']} of them learnt" in text
    assert f"truncated                       {report.truncated}" in text and report.truncated > 0
    assert "rows.jsonl:30:`output`ismissing" in "".join(
        text.split()
    )  # where it wraps, the path's length says
    assert "bad rows                        1" in text
    assert "█" * 40 in text and f"-{report.lengths['max']}" in text


def test_pairs_stand_side_by_side(arguments, encoder):
    rows = [{"prompt": "Which?", "chosen": "the good one", "rejected": "the bad one"}]
    text = shown(prepare(**arguments(rows, shape="preference"))["train"], encoder())
    (line,) = [line for line in text.splitlines() if "the good one" in line]
    assert "the bad one" in line and "Which?" in text


def test_prompts_show_their_columns_and_long_rows_are_cut(arguments, encoder):
    text = shown(prepare(**arguments([{"prompt": "a?", "answer": 42}], shape="prompt"))["train"], encoder())
    assert "a?" in text and "answer: 42" in text
    long = prepare(**arguments([{"text": "word " * 3000}], shape="text", max_length=10_000))["train"]
    text = shown(long, encoder())
    assert "..." in text and text.count("word") < 1000
