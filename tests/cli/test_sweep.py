"""A sweep is composed and checked whole before anything is called."""

import tempfile
import time
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from soup.cli.loader import SoupLoader


def test_all_points_in_one_call(shell):
    points = shell.points("plan", "-m", "task=dpo,sft", "lora.r=range(1,4)")
    assert [(one.choices["task"], one.tree["lora"]["r"]) for one in points] == [
        (task, rank) for task in ("dpo", "sft") for rank in (1, 2, 3)
    ]
    assert points[0].overrides == ("task=dpo", "lora.r=1")


def test_one_point_is_a_sweep_too(shell):
    assert len(shell.points("-m", "lora.r=4")) == 1


def test_problems_of_all_points_come_together(shell):
    result = shell.run("-m", "task=dpoo,sft,kt", "lora.r=1")
    assert result.status == 2
    assert "task=dpoo" in result.err
    assert "task=kt:" in result.err
    assert shell.calls == []


def test_a_swept_experiment_and_a_plus(shell):
    points = shell.points("-m", "+experiment=quickstart", "lora.r=1,2")
    assert [one.choices["experiment"] for one in points] == ["quickstart"] * 2


def test_a_key_that_only_the_swept_choices_have(shell):
    points = shell.points("-m", "task=dpo,ipo", "task.beta=0.2")
    assert [one.tree["task"]["beta"] for one in points] == [0.2, 0.2]
    result = shell.run("-m", "task=dpo,sft", "task.beta=0.2")
    assert result.status == 2
    assert "task.beta=0.2: no such key" in result.err


@pytest.mark.parametrize(
    "argv",
    [
        ["task=dpo,sft", "lora.r=1,2", "optim.lr=1e-3", "training.max_steps=null,3"],
        ["lora.target_modules=[q_proj],[k_proj,v_proj]", "experiment=quickstart"],
        ["+mine.a=1,2", "lora.r=3"],
        ["run.name=a,b", "lora.r=3,4"],
        ["run.name=${lora.r}", "lora.r=3,4"],
        ["tracking=[wandb,tensorboard]", "tracking.wandb.tags=[a],[b]"],
        ["model.chat_template='a,b',c", "lora=lora,dora", "lora.alpha=4"],
    ],
)
def test_points_are_those_that_hydra_composes(shell, argv, monkeypatch):
    """Most points are not composed anew; they must not differ from those that are."""
    quick = shell.points("-m", *argv)
    monkeypatch.setattr(SoupLoader, "load_sweep_config", ConfigLoaderImpl.load_sweep_config)
    assert quick == shell.points("-m", *argv)
    assert len(quick) > 1


def test_a_hundred_points_are_composed_in_a_fraction_of_hydras_time(shell):
    begin = time.process_time()
    assert len(shell.points("-m", "training.seed=range(0,100)")) == 100
    assert time.process_time() - begin < 5, "Hydra's own way takes 8"


def test_an_interpolation_follows_each_point(shell):
    points = shell.points("-m", "lora.r=2,4", "lora.alpha=${lora.r}")
    assert [one.tree["lora"]["alpha"] for one in points] == [2, 4]


def test_the_worst_status_of_a_batched_sweep(shell):
    shell.status = 1
    result = shell.run("-m", "hydra.sweeper.max_batch_size=2", "lora.r=1,2,3")
    assert result.status == 1
    assert [len(points) for points in shell.calls] == [2, 1]


def test_the_agreeing_launcher_may_be_given(shell):
    assert len(shell.points("-m", "hydra/launcher=soup_local", "lora.r=1,2")) == 2


def test_a_sweep_may_be_configured(shell, tmp_path):
    (tmp_path / "own/experiment").mkdir(parents=True)
    (tmp_path / "own/experiment/grid.yaml").write_text(
        "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {lora.r: '1,2', task: 'dpo,sft'}}}\n"
    )
    assert len(shell.points("experiment=grid", "--config-dir", str(tmp_path / "own"))) == 4


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["lora.r=interval(1,2)"], "does not support sweep type"),
        (["lora.r=range(1,5,0)"], "must not be zero"),
        (["lora.r=range(5,5)"], "a sweep without points"),
        (["hydra.sweeper.max_batch_size=0"], "the sweeper does not accept this"),
        (["hydra/sweeper=optuna_"], "no such choice"),
        (["hydra.sweeper=3"], "hydra/sweeper=basic"),
        (["hydra.sweeper=null"], "Hydra sweeper is not configured"),
        (["~hydra/launcher"], "soup does not read"),
        (["task=dpo,ipo", "task.betta=1"], "did you mean task.beta?"),
        (["hydra/launcher=basic"], "launch=local runs with soup_local"),
        (["hydra.verbose=true,false"], "cannot be swept"),
        (["launch=local,slurm"], "one sweep has one launcher"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(shell, argv, said):
    result = shell.run("--multirun", *argv)
    assert result.status == 2
    assert said in result.err
    assert shell.calls == []


def test_the_sweepers_scratch_folder_is_removed(shell, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    shell.points("-m", "lora.r=1,2")
    assert list(Path(tempfile.gettempdir()).iterdir()) == []
