"""What is generated is current, and what the README shows composes."""

import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from soup.cli.main import COMMANDS, main, parse
from soup.rules import markdown

ROOT = Path(__file__).parent.parent


def test_rules_page_is_current():
    assert (ROOT / "docs/rules.md").read_text() == markdown()


@pytest.fixture(scope="module")
def settings():
    spec = importlib.util.spec_from_file_location("settings_page", ROOT / "docs/settings.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_settings_page_is_current(settings):
    assert (ROOT / "docs/settings.md").read_text() == settings.page(), "make docs"


@pytest.mark.parametrize(
    ("file", "comment", "key"),
    [
        ("optim/lion.yaml", "# weight of the moment in the step's sign (the paper's)", None),
        ("task/kto.yaml", "# lambda_U: weight of answers with a thumb down", "task.undesirable_weight"),
        ("tracking/mlflow.yaml", "# that runs are filed under", "tracking.mlflow.experiment"),
        (
            "config.yaml",
            "# optimizer steps between checkpoints: what a crash can cost",
            "training.save_steps",
        ),
    ],
)
def test_a_key_without_a_comment_fails(settings, tmp_path, file, comment, key):
    conf = shutil.copytree(ROOT / "conf", tmp_path / "conf")
    text = (conf / file).read_text()
    assert comment in text
    (conf / file).write_text(text.replace(comment, ""))
    if key is None:  # another choice of the group says it of the same key
        assert settings.page(conf)
        return
    with pytest.raises(SystemExit, match=f"{re.escape(key)}: has no comment"):
        settings.page(conf)


def test_a_key_without_an_effect_fails(settings, tmp_path):
    conf = shutil.copytree(ROOT / "conf", tmp_path / "conf")
    text = (conf / "config.yaml").read_text()
    (conf / "config.yaml").write_text(text.replace("  epochs:", "  made_up: 1  # a new key\n  epochs:", 1))
    with pytest.raises((SystemExit, KeyError), match="made_up"):
        settings.page(conf)


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^    ((?:python -m soup|soup|make|eval) ?.*?)(?:\s+# (.*))?$", re.M)
UNTRIED = re.compile(r"needs a (GPU|hub|cluster): not tried yet")
PLACEHOLDERS = {"soup.yaml": "soup-cli/every_key.yaml", "llama3_lora_sft.yaml": "llamafactory/lora_sft.yaml"}
PLACEHOLDERS |= {"qlora.yml": "axolotl/qlora.yml", "sft.yaml": "trl/sft_minimal.yaml"}


def shown():
    """Every command that a page shows: page, command, comment."""
    for page in PAGES:
        for command, comment in COMMAND.findall(page.read_text()):
            yield page.name, command, comment or ""


ALL = list(shown())
SOUP = [
    (page, command.removeprefix("python -m ").removeprefix("soup").strip(), comment)
    for page, command, comment in ALL
    if not command.startswith(("make", "eval")) and "[SWEEP]" not in command
]
TRIED = [(page, command) for page, command, comment in SOUP if not UNTRIED.search(comment)]


def words_of(command):
    return shlex.split(command.partition(" > ")[0].partition(" | ")[0])


def test_pages_show_commands():
    assert len(SOUP) >= 60
    assert {page for page, _, _ in SOUP} >= {"README.md", "index.md", "composing.md", "sweeps.md", "slurm.md"}
    untried = [command for _, command, comment in SOUP if UNTRIED.search(comment)]
    assert len(untried) <= 4, "what is marked as not tried is the exception"


def test_make_targets_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for _, command, _ in ALL:
        if command.startswith("make"):
            assert command.split()[1] in targets, command


@pytest.mark.parametrize("command", [f"{page}: {command}" for page, command in TRIED])
def test_a_command_that_a_page_shows(command, tmp_path, monkeypatch, capsys):
    """Composes for real; what composes nothing and needs no run is done for real."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "CONF/experiment").mkdir(parents=True)
    (tmp_path / "CONF/experiment/mine.yaml").write_text("# @package _global_\nlora: {r: 3}\n")
    for name, data in PLACEHOLDERS.items():
        shutil.copy(ROOT / "tests/importers/data" / data, tmp_path / name)
    words = words_of(command.partition(": ")[2])
    args = parse(words)
    if args.shell_completion:
        assert main(words) == 0
    elif COMMANDS[args.command].composes and not (args.cfg or args.info):
        done = [word for word in words if word not in (*COMMANDS, "--multirun", "--json")]
        sweeps = [word if "[" in word or "(" in word else word.partition(",")[0] for word in done]
        sweeps = [word for word in sweeps if not word.startswith("sweep.") and "interval" not in word]
        assert main([*sweeps, "--cfg", "job"]) == 0, capsys.readouterr().err
        if args.command == "why":
            assert main(words) == 0
    elif args.command in ("recipes", "schema", "import") or args.cfg or args.info:
        assert main(words) == 0, capsys.readouterr().err
    else:  # it asks for a run or a sweep, and here is none: `test_commands_about_a_run` has one
        status = main(words)
        said = capsys.readouterr()
        assert status == 0 or re.search("no runs? in|no run$|sweep", said.err, re.M), said
    capsys.readouterr()


def test_commands_about_a_run(build, place, tree, tmp_path, monkeypatch, capsys):
    """Each that the pages show, on a finished run."""
    from soup.train.finish import save_model

    overrides = ("model.dtype=float32", "training.max_steps=2")
    built, run = build(*overrides), place(tree(*overrides), "outputs")
    built.trainer.metrics_file = run.metrics
    built.trainer.train()
    save_model(run, built, {"step": 2})
    run.finish("finished", step=2, steps=2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Who are you?"}\n')
    tried = [
        command
        for _, command in TRIED
        if command.split()[:1] in (["runs"], ["chat"], ["generate"], ["report"])
    ]
    assert len(tried) >= 6
    for command in dict.fromkeys(tried):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        words = [run.id if word == "ID" else word for word in words_of(command)]
        more = ["--max-tokens", "4"] if words[0] in ("chat", "generate") else []
        assert main([*words, *more]) == 0, (command, capsys.readouterr().err)
    assert (tmp_path / "answers.jsonl").is_file() and (run.folder / "merged/config.json").is_file()


def test_the_site_builds(tmp_path):
    """Strict: a broken link or anchor, or a page that the menu leaves out, fails."""
    pytest.importorskip("mkdocs")
    words = ["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert pages >= {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}


def test_the_changelog_and_contributing_name_what_is_there():
    for file in re.findall(r"`((?:soup|tests|conf|docs)/[\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text()):
        if "NAME" not in file:
            assert (ROOT / file).exists(), file
