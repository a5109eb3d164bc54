"""A user's own YAML, added with --config-dir."""

import pytest


@pytest.fixture
def own(tmp_path):
    folder = tmp_path / "own folder"

    def write(path, text):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
        return str(folder)

    return write


OVERLAY = "# @package _global_\ndefaults:\n  - override /task: dpo\nlora:\n  r: 5\n"


@pytest.mark.parametrize("plus", ["", "+"])
def test_an_own_experiment(shell, own, plus):
    folder = own("experiment/mine.yaml", OVERLAY)
    (point,) = shell.points(f"{plus}experiment=mine", "--config-dir", folder, "lora.alpha=7.0")
    assert point.choices["experiment"] == "mine"
    assert point.choices["task"] == "dpo"
    assert (point.tree["lora"]["r"], point.tree["lora"]["alpha"]) == (5, 7.0)


def test_an_own_choice_built_on_soups(shell, own):
    folder = own("lora/wide.yaml", "defaults:\n  - dora\n  - _self_\nr: 256\n")
    (point,) = shell.points("lora=wide", "-cd", folder)
    assert point.choices["lora"] == "wide"
    assert (point.tree["lora"]["name"], point.tree["lora"]["r"]) == ("lora", 256)


def test_own_choices_are_suggested_and_listed(shell, own):
    folder = own("lora/wide.yaml", "name: lora\n")
    assert "did you mean lora=wide?" in shell.run("lora=wid", "-cd", folder).err
    assert "wide" in shell.run("--help", "-cd", folder).out


@pytest.mark.parametrize(
    ("path", "text", "argv", "said"),
    [
        (
            "experiment/mine.yaml",
            "# @package _global_\ntask: {name: kto}\n",
            [],
            "task.name=kto: contradicts task=sft",
        ),
        ("experiment/mine.yaml", "# @package _global_\na: [1\n", [], "mine.yaml:3: not valid YAML"),
        (
            "experiment/mine.yaml",
            "# @package _global_\ndefaults:\n  - override /task: dpoo\n",
            [],
            "task=dpoo",
        ),
        ("experiment/mine.yaml", "# @package _global_\ndefaults: 3\n", [], "must be a list"),
        ("experiment/mine.yaml", "# @package _global_\ndefaults:\n  - nowhere\n", [], "experiment/nowhere"),
        ("experiment/mine.yaml", "# @package _global_\ndefaults:\n  - mine\n", [], "mine"),
        ("task/dpo.yaml", "name: dpo\n", [], "soup has a task/dpo.yaml of its own"),
        ("lora/bad.yaml", "name: ${oops\n", ["lora=bad"], "fix: "),
    ],
)
def test_a_broken_own_file_is_refused(shell, own, path, text, argv, said):
    argv = argv or ["experiment=mine"]
    result = shell.run(*argv, "--config-dir", own(path, text))
    assert result.status == 2
    assert said in result.err
    assert "Traceback" not in result.err


def test_bytes_that_are_no_text_are_refused(shell, own, tmp_path):
    folder = own("experiment/mine.yaml", "")
    (tmp_path / "own folder/experiment/mine.yaml").write_bytes(b"\xff\xfe\x00a: 1")
    result = shell.run("experiment=mine", "--config-dir", folder)
    assert result.status == 2


def test_a_search_path(shell, own):
    folder = own("experiment/mine.yaml", OVERLAY)
    (point,) = shell.points("experiment=mine", f"hydra.searchpath=['{folder}']")
    assert point.tree["lora"]["r"] == 5
    result = shell.run("experiment=min", f"hydra.searchpath=['{folder}']", "lora.rr=1")
    assert "did you mean experiment=mine?" in result.err
    assert "lora.rr=1" in result.err


def test_another_primary_configuration(shell, own):
    folder = own("small.yaml", "defaults:\n  - config\n  - _self_\nlora:\n  r: 2\n")
    (point,) = shell.points("--config-name", "small", "-cd", folder)
    assert point.tree["lora"]["r"] == 2
