"""Talking to a run's model: what is streamed is what transformers generates, and the conversation is kept."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from soup.cli import push as pushing
from soup.cli.main import main
from soup.cli.quiet import libraries_quiet
from soup.cli.talk import HELP
from soup.errors import Problem, Refused

TRAINED = ("model.dtype=float32", "training.max_steps=6", "optim.lr=2e-2", "training.logging_steps=3")


@pytest.fixture
def finished(build, place, tree, tmp_path, monkeypatch):
    """A trained run below tmp_path/runs, with its model folder."""
    import transformers

    monkeypatch.setattr("soup.device._cpu_flags", frozenset)  # float32 where bfloat16 would be taken
    monkeypatch.setattr(transformers.utils.logging, "set_verbosity_error", lambda: None)
    monkeypatch.setattr(transformers.utils.logging, "disable_progress_bar", lambda: None)

    def trained(*overrides):
        from soup.train.finish import save_model

        built = build(*TRAINED, *overrides)
        run = place(tree(*TRAINED, *overrides))
        built.trainer.metrics_file = tmp_path / "metrics.jsonl"
        built.trainer.train()
        save_model(run, built, {"step": 6})
        run.finish("finished", step=6)
        return run, f"run.root={run.folder.parent}"

    return trained


def expected(folder, conversations, tokens, adapter=True):
    """What PEFT and transformers alone answer, greedily."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for talk in conversations:
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        batch = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        ids = model.generate(**batch, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        found.append(tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


def user(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("overrides", [(), ("lora=none",)], ids=["adapter", "all weights"])
def test_generate(finished, tiny_model, tmp_path, capsys, overrides):
    run, root = finished(*overrides)
    talk = [*user("Count."), {"role": "assistant", "content": "six"}, *user("And then?")]
    rows = [{"prompt": "How do I boil an egg?"}, {"messages": talk}, {"prompt": "Who are you?"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["generate", run.id, root, "--prompts", str(tmp_path / "p.jsonl"), "--max-tokens", "12", "--base"]
    assert main([*words, "--out", str(tmp_path / "out.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    talks = [user(rows[0]["prompt"]), talk, user(rows[2]["prompt"])]
    assert [line["prompt"] for line in lines] == [rows[0]["prompt"], talk, rows[2]["prompt"]]
    assert [line["completion"] for line in lines] == expected(run.model, talks, 12, adapter=not overrides)
    assert [line["base"] for line in lines] == expected(tiny_model, talks, 12, adapter=False)
    assert lines[0]["completion"] != lines[0]["base"]

    (tmp_path / "p.txt").write_text("How do I boil an egg?\n\nWho are you?\n")
    capsys.readouterr()
    assert main(["generate", run.id, root, "--prompts", str(tmp_path / "p.txt"), "--max-tokens", "12"]) == 0
    printed = [json.loads(line)["completion"] for line in capsys.readouterr().out.splitlines()]
    assert printed == [lines[0]["completion"], lines[2]["completion"]]


def test_chat_keeps_the_conversation(finished, tiny_model, capsys, monkeypatch):
    run, root = finished()
    monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?\n\nAnd I?\n/new\nAnd I?\n/quit\nnever\n"))
    assert main(["chat", root, "--base", "--max-tokens", "8"]) == 0
    shown = capsys.readouterr().out
    for folder, name, adapter in ((run.model, "tuned", True), (tiny_model, "base", False)):
        first = user("Who are you?")
        (answer,) = expected(folder, [first], 8, adapter)
        later = [*first, {"role": "assistant", "content": answer.strip()}, *user("And I?")]
        again, anew = expected(folder, [later, user("And I?")], 8, adapter)
        told = [shown.index(f"{name}: {text}") for text in (answer, again, anew)]
        assert told == sorted(told), "in this order"
    assert shown.count("tuned: ") == 3


def test_a_base_that_is_gone(finished, tiny_model, tmp_path, capsys):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    _, root = finished(f"model.base={base}")
    shutil.rmtree(base)
    assert main(["chat", root]) == 2
    shown = capsys.readouterr().err
    assert f"lacks its base\n    fix: its base, {base}, where it was" in shown


class Terminal(io.StringIO):
    """What is typed, or what is shown. `interrupts`: the number of a piece of an answer, at which Ctrl-C is pressed."""

    interrupts = None

    def isatty(self):
        return True

    def write(self, text):
        if self.interrupts is not None and text not in ("", "\n", "\n> ", HELP):
            self.interrupts -= 1
            if self.interrupts == 0:
                signal.raise_signal(signal.SIGINT)
        return super().write(text)


@pytest.fixture
def interruptible():
    """Ctrl-C as in a program that a terminal started; what a shell put in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(finished, monkeypatch):
    run, root = finished()
    shown = Terminal()
    monkeypatch.setattr("sys.stdin", Terminal("Who are you?\nAnd I?\n"))
    monkeypatch.setattr("sys.stdout", shown)
    shown.interrupts = 3
    assert main(["chat", root, "--max-tokens", "30"]) == 0
    first, second = (part.rstrip("\n") for part in shown.getvalue().split("\n> ")[1:3])
    (whole,) = expected(run.model, [user("Who are you?")], 30)
    assert 0 < len(first) < len(whole) and whole.startswith(first)
    later = [*user("Who are you?"), {"role": "assistant", "content": first.strip()}, *user("And I?")]
    assert second == expected(run.model, [later], 30)[0].rstrip("\n")
    assert shown.getvalue().endswith("\n> \n"), "Ctrl-D"


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_what_reads_from_a_pipe(finished, monkeypatch):
    _, root = finished()
    shown = Terminal()
    monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?\nAnd I?\n"))
    monkeypatch.setattr("sys.stdout", shown)
    shown.interrupts = 2
    assert main(["chat", root, "--max-tokens", "30"]) == 130


def test_what_is_streamed_comes_in_pieces_and_stops_when_left(finished):
    from soup.model.talk import Speaker

    run, _ = finished()
    speaker = Speaker(run, base=False, max_tokens=60, temperature=0.0)
    whole = list(speaker.stream("Who are you?"))
    assert len(whole) > 3 and "".join(whole) == next(speaker.answers(["Who are you?"]))
    left = speaker.stream("Who are you?")
    assert next(left) == whole[0]
    left.close()
    drawn = [
        "".join(Speaker(run, base=False, max_tokens=30, temperature=1.5).stream("Who?")) for _ in range(2)
    ]
    assert drawn[0] == drawn[1], "from the run's seed"


@pytest.mark.parametrize(
    ("error", "shown"),
    [(None, False), (Refused(Problem(key="k", why="w", fix="f")), False), (RuntimeError("?"), True)],
    ids=["done", "refused", "unforeseen"],
)
def test_what_libraries_say_is_shown_where_something_unforeseen_fails(error, shown, capfd):
    def said():
        with libraries_quiet():
            os.write(2, b"a library's warning\n")
            if error is not None:
                raise error

    if error is None:
        said()
    else:
        with pytest.raises(type(error)):
            said()
    os.write(2, b"after it\n")
    assert capfd.readouterr().err == ("a library's warning\n" if shown else "") + "after it\n"


@pytest.mark.slow
def test_nothing_but_answers_reaches_the_terminal(finished, tmp_path):
    """In a process of its own, where torchao, torch and bitsandbytes say what they say when they are imported."""
    run, root = finished()
    (tmp_path / "p.jsonl").write_text('{"prompt": "Who?"}\n')
    for words, typed in (
        (["generate", run.id, root, "--prompts", str(tmp_path / "p.jsonl"), "--max-tokens", "2"], ""),
        (["chat", run.id, root, "--base", "--max-tokens", "2"], "\nWho?\n"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "soup", *words], input=typed, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), done
        assert done.stdout.startswith(("{", "base: ")), done.stdout


REFUSED = {
    "no prompts": (["generate", "RUN"], "needs prompts", "--prompts FILE.jsonl"),
    "no such file": (["generate", "RUN", "--prompts", "none.txt"], "cannot be read", "a .jsonl or .txt file"),
    "no prompt": (["generate", "RUN", "--prompts", "bad.jsonl"], "bad.jsonl:2: is no prompt", '{"prompt"'),
    "an empty file": (
        ["generate", "RUN", "--prompts", "empty.txt"],
        "has no line",
        "one prompt in each line",
    ),
    "no model": (["chat", "RUN"], "has no model: it is ", "soup runs resume"),
    "two runs": (["chat", "RUN", "RUN"], "takes one run", "soup chat"),
    "no tokens": (
        ["chat", "RUN", "--max-tokens", "0"],
        "--max-tokens=0: must be at least 1",
        "--max-tokens 1",
    ),
    "a flag of another command": (["plan", "--base"], "is for `chat` and `generate` only", "drop it"),
    "push without a name": (
        ["runs", "push", "RUN"],
        "takes a run and a name",
        "soup runs push RUN OWNER/NAME",
    ),
    "push without a model": (["runs", "push", "RUN", "me/it"], "has no model/ yet", "soup runs resume"),
    "push without the merged": (
        ["runs", "push", "RUN", "me/it", "--merged"],
        "no merged/",
        "runs export --merged",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, place, tree, tmp_path, monkeypatch, capsys):
    run = place(tree())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "empty.txt").write_text("\n")
    words, why, fix = REFUSED[case]
    root = [] if words[0] == "plan" else [f"run.root={run.folder.parent}"]
    assert main([run.id if word == "RUN" else word for word in words] + root) == 2
    shown = capsys.readouterr().err
    assert why in shown and fix in shown, shown


def test_a_reward_model_answers_nothing(place, tree, capsys):
    run = place(tree("task=reward"))
    assert main(["chat", run.id, f"run.root={run.folder.parent}"]) == 2
    assert "is a reward model" in capsys.readouterr().err


class TestPush:
    """Up to where a hub is needed: none has been tried here."""

    @pytest.fixture
    def run(self, place, tree):
        run = place(tree())
        (run.folder / "merged").mkdir()
        run.model.mkdir()
        (run.model / "README.md").write_text("# card\n")
        content = {"base_model_name_or_path": "/root/.cache/somewhere", "r": 4}
        (run.model / "adapter_config.json").write_text(json.dumps(content))
        return run

    @pytest.mark.parametrize("kind", ["merged", "all weights"])
    def test_offline(self, run, kind, monkeypatch, capsys):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        if kind == "all weights":
            (run.model / "adapter_config.json").unlink()
        more = ["--merged"] if kind == "merged" else []
        assert main(["runs", "push", *more, run.id, "me/it", f"run.root={run.folder.parent}"]) == 2
        shown = capsys.readouterr().err
        assert "HF_HUB_OFFLINE is set, so no hub is asked" in shown
        assert f"unset HF_HUB_OFFLINE; where no hub can be reached, copy {run.folder} to a machine" in shown

    def test_not_logged_in(self, run, monkeypatch, capsys):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(run.folder / "none"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        words = ["runs", "push", "--merged", run.id, "me/it", f"run.root={run.folder.parent}"]
        assert main(words) == 2
        assert "hf auth login" in capsys.readouterr().err

    def test_a_hub_that_does_not_answer(self, run):
        """A process of its own: the client reads where its hub is when it is imported."""
        there = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_none", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-m", "soup", "runs", "push", "--merged", run.id, "me/it"]
            + [f"run.root={run.folder.parent}"],
            env=os.environ | there,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert "http://127.0.0.1:9 does not answer: " in done.stderr and str(run.folder) in done.stderr

    def test_an_adapter_for_a_local_base_is_refused(self, run, capsys):
        assert main(["runs", "push", run.id, "me/it", f"run.root={run.folder.parent}"]) == 2
        assert "a folder that only this machine has" in capsys.readouterr().err

    def test_an_adapter_names_its_base_on_the_hub(self, compose, place, tmp_path):
        run = place(compose("training.max_steps=3"))
        run.model.mkdir()
        (run.model / "adapter_config.json").write_text(
            '{"base_model_name_or_path": "/root/.cache/somewhere"}'
        )
        staged = pushing.stage(run, run.model, tmp_path / "staged")
        content = json.loads((staged / "adapter_config.json").read_text())
        assert content["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((), "--enable-lora --max-lora-rank 16 --lora-modules tuned=FOLDER"),
        (("lora=dora",), "serves no DoRA"),
        (("lora=none",), "vllm serve FOLDER"),
        (("lora.r=20",), "--max-lora-rank 32"),
        (("model.chat_template=chatml.jinja",), "tuned=FOLDER --chat-template FOLDER/chat_template.jinja"),
    ],
    ids=str,
)
def test_the_card_says_how_to_serve_it(overrides, says, tree):
    from soup.schema import check
    from soup.train.finish import _serving

    assert says in _serving(check(tree(*overrides)), False, None)
