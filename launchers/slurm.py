"""`launch=slurm`: the points of a sweep, composed and checked together here, then run as a SLURM job array."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore
from hydra_plugins.soup_launchers.local import LocalLauncher

ConfigStore.instance().store(
    group="hydra/launcher",
    name="soup_slurm",
    node={"_target_": "hydra_plugins.soup_launchers.slurm.SlurmLauncher"},
    provider="soup",
)


class SlurmLauncher(LocalLauncher):
    """Hands every point to soup at once, which submits them: see `_slurm.py`, and `_job.py` for what a job does."""
