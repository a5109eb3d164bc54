"""Hub models as a machine has them: in full, without weights, or not at all, when only a plan can stand in."""

import json
import shutil

import pytest

from soup import schema
from soup.errors import Refused
from soup.model import source

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the hub's library; no hub is reached (tests/conftest.py)."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def snapshot(hub_cache, tiny_model):
    """`snapshot("org/name", without=[...])`: the tiny model as the hub's library caches it."""

    def cached(name, *, without=()):
        folder = hub_cache / f"models--{name.replace('/', '--')}"
        files = folder / "snapshots" / COMMIT
        shutil.copytree(tiny_model, files, ignore=shutil.ignore_patterns(*without))
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text(COMMIT)
        return files

    return cached


@pytest.fixture
def spec(compose):
    return lambda *overrides: schema.check(compose("model=hub", *overrides)).model


@pytest.mark.parametrize("revision", ["null", "main", COMMIT])
def test_a_cached_model_is_found_offline(snapshot, spec, revision):
    files = snapshot("org/name")
    asked = spec("model.base=org/name", f"model.revision={revision}")
    assert source.folder(asked) == files
    assert source.described(asked, weights=True).folder == files


def test_a_plan_asks_for_no_weights_and_training_does(snapshot, spec):
    files = snapshot("org/name", without=["*.safetensors"])
    asked = spec("model.base=org/name")
    seen = source.described(asked, weights=False)
    assert (seen.folder, seen.notes) == (files, {})
    assert seen.config["hidden_size"] == 64
    with pytest.raises(Refused, match=r"has no \*\.safetensors weights"):
        source.described(asked, weights=True)


@pytest.mark.parametrize("weights", [False, True])
def test_what_is_downloaded(snapshot, spec, monkeypatch, weights):
    files, asked = snapshot("org/name"), []

    def download(**wanted):
        asked.append(wanted["allow_patterns"])
        return str(files)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source.folder(spec("model.base=org/name"), weights=weights)
    assert ["*.safetensors" in patterns for patterns in asked] == [weights]
    assert "*.json" in asked[0]


def test_the_models_own_files_come_before_what_soup_carries(snapshot, spec):
    files = snapshot(LLAMA)
    seen = source.described(spec(f"model.base={LLAMA}"), weights=False)
    assert (seen.folder, seen.notes, seen.config["hidden_size"]) == (files, {}, 64)


def test_what_soup_carries_stands_in_for_a_plan_only(spec):
    asked = spec(f"model.base={LLAMA}")
    seen = source.described(asked, weights=False)
    assert seen.config["hidden_size"] == 4096
    assert seen.folder == source.embedded()
    assert set(seen.notes) == {"model", "lengths"}
    for weights_wanted in (source.folder, lambda spec: source.described(spec, weights=True)):
        with pytest.raises(Refused, match="the hub gave none"):
            weights_wanted(asked)


def test_what_soup_carries_stands_in_for_a_cache_without_a_tokenizer(snapshot, spec):
    snapshot(LLAMA, without=["tokenizer.json"])
    seen = source.described(spec(f"model.base={LLAMA}"), weights=False)
    assert seen.config["hidden_size"] == 4096
    assert "has no tokenizer.json" in seen.notes["model"]


@pytest.mark.parametrize("name", ["nobody/nothing-of-this-name", "Llama-3.1-8B-Instruct", "../configs/x"])
def test_nothing_stands_in_for_another_model(spec, name):
    with pytest.raises(Refused, match="model.base"):
        source.described(spec(f"model.base={name}"), weights=False)


def test_nothing_stands_in_for_a_local_folder_of_that_name(spec, tmp_path):
    (tmp_path / LLAMA).mkdir(parents=True)
    (tmp_path / LLAMA / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(Refused, match="the folder has no tokenizer.json"):
        source.described(spec(f"model.base={LLAMA}"), weights=False)


def test_a_missing_folder_is_no_hub_name_whatever_the_revision(spec):
    """A recipe's pinned revision stays when only model.base is overridden."""
    with pytest.raises(Refused, match="no such folder"):
        source.folder(spec("model.base=./mine", f"model.revision={COMMIT}"))
