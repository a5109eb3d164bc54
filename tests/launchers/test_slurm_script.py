"""What `launch=slurm` writes, on a machine without SLURM; tests/slow/test_slurm.py has one."""

import json

import pytest

from soup import record, schema, snapshot
from soup.errors import Refused


def test_the_script_is_shown_and_nothing_submitted(shell, monkeypatch):
    """Points that ask for different resources are different arrays."""
    monkeypatch.setenv("PATH", "/nowhere")
    words = ("--multirun", "launch=slurm", "lora.r=2,4", "launch.cpus=${lora.r}", "launch.partition=short")
    done = shell.run(
        *words, "launch.dry_run=true", "launch.setup=[module load x]", "launch.extra={mail_type:FAIL}"
    )
    assert done.status == 0, done.out
    scripts = [path.read_text() for path in shell.root.glob("sweeps/*/slurm/*/script.sh")]
    assert sorted(text.split("#SBATCH --cpus-per-task=")[1][0] for text in scripts) == ["2", "4"]
    for text in scripts:
        assert text in done.out
        assert "#SBATCH --array=0-0%1" in text
        assert "#SBATCH --partition=short" in text and "#SBATCH --mail-type=FAIL" in text
        assert "#SBATCH --requeue" in text and "#SBATCH --signal=USR2@120" in text
        assert "gpus" not in text and "export CUDA_VISIBLE_DEVICES=\n" in text
        assert text.index("module load x") < text.index("export PYTHONPATH=")
    runs = [
        json.loads(path.read_text())["runs"] for path in shell.root.glob("sweeps/*/slurm/*/submission.json")
    ]
    assert sorted(run for one in runs for run in one) == sorted(
        path.parent.name for path in shell.root.glob("*/plan.json")
    )


def test_nodes_and_gpus_are_those_of_the_plan(shell, monkeypatch):
    """A task on each node, a GPU for each process there; of an array's jobs so many run at once."""
    monkeypatch.setenv("PATH", "/nowhere")
    spread = ("distributed=ddp", "distributed.nodes=2", "launch.array_parallelism=3")
    words = ("--multirun", "launch=slurm", "launch.device=cuda", "launch.dry_run=true", *spread)
    for each in (
        ("distributed.processes=4", "lora.r=1,2,4,8,16"),
        ("distributed.processes=2", "lora.r=3,5,6,7,9", "launch.gpus=${distributed.processes}"),
    ):
        done = shell.run(*words, *each)
        assert done.status == 0, done.out
    found = [path.read_text() for path in shell.root.glob("sweeps/*/slurm/*/script.sh")]
    assert sorted(text.split("#SBATCH --gpus-per-node=")[1][0] for text in found) == ["2", "4"]
    for text in found:
        assert "#SBATCH --nodes=2" in text and "#SBATCH --ntasks-per-node=1" in text
        assert "#SBATCH --array=0-4%3" in text
        assert "--kill-on-bad-exit=1 --wait=60" in text
        assert "CUDA_VISIBLE_DEVICES=" not in text


def test_without_slurm_it_is_refused(shell, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    words = ("--multirun", "launch=slurm", "lora.r=2,4")
    done = shell.run(*words)
    assert done.status == 2
    assert "launch=slurm: there is no `squeue` on this machine" in done.out
    assert not [*shell.root.glob("*/config.yaml"), *shell.root.glob("sweeps/*/")], "nothing stays behind"

    assert shell.run(*words, "launch.dry_run=true").status == 0
    there = sorted(shell.root.glob("**/*.json"))
    assert shell.run("launch=slurm", "lora.r=8").status == shell.run(*words).status == 2
    assert sorted(shell.root.glob("**/*.json")) == there, "but for what was there before"


def test_a_search_without_slurm_does_not_wait_for_it(shell, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    done = shell.run(
        "--multirun", "launch=slurm", "hydra/sweeper=optuna", "lora.r=2,4", "hydra.sweeper.n_trials=2"
    )
    assert done.status == 2, done.out
    assert "there is no `squeue` on this machine" in done.out


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("launch.extra={mem: 4GB}",), "launch.extra.mem"),
        (("launch.extra={job_name: x}",), "launch.extra.job-name"),
        (("launch.extra={requeue: false}",), "launch.extra.requeue"),
        (("launch.extra={exclusive: false}",), "launch.extra.exclusive"),
        (("launch.extra={A: x}",), "launch.extra.A"),
        (("launch.time=1", "launch.grace_s=60"), "launch.grace_s"),
    ],
)
def test_options_that_would_be_in_the_way(tree, words, key):
    with pytest.raises(Refused) as refused:
        schema.check(tree("launch=slurm", *words))
    assert [problem.key for problem in refused.value.problems] == [key]


def test_a_snapshot_is_the_code(tmp_path, compose):
    compose()  # makes the launchers importable
    folder = snapshot.take(tmp_path)
    assert record.hash_of(folder / "soup") == record.source_hash()
    assert folder.name == record.source_hash()[:12]
    assert (folder / "conf/config.yaml").is_file()
    assert (folder / "hydra_plugins/soup_launchers/_job.py").is_file()
    environment = json.loads((folder / "environment.json").read_text())
    assert len(environment["commit"]) == 40 and environment["packages"]["submitit"]
    assert (folder / "changes.diff").is_file()
    assert snapshot.take(tmp_path) == folder
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
