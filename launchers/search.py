"""`hydra/sweeper=optuna`: points proposed one after the other. Hydra's own plugin wants optuna 2, and runs batches."""

from __future__ import annotations

from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class OptunaSweeper(Sweeper):
    """Composes the points that need no results, and hands them to soup; `study` proposes and composes the others."""

    def __init__(
        self, n_trials: int, n_jobs: int | None, direction: str | None, params: Any, sampler: DictConfig
    ):
        self.settings = {"n_trials": n_trials, "n_jobs": n_jobs, "direction": direction}
        self.params = dict(params or {})
        self.sampler = OmegaConf.to_container(sampler, resolve=True)
        self.study: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader = hydra_context.config_loader
        self.task_function = task_function
        self.config = config

    def sweep(self, arguments: list[str]) -> Any:
        """Returns the exit status.

        Raises:
            Refused: with the problems of the space, and of points that cannot be composed.
        """
        from soup.cli.compose import point
        from soup.cli.space import Proposer, Settings, space

        words = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        parsed = OverridesParser.create(config_loader=self.loader).parse_overrides(words)
        settings = Settings.checked(self.settings, self.sampler)  # first: it says so where Optuna is missing
        self.study = Proposer(
            axes=space(parsed),
            fixed=tuple(one.input_line for one in parsed if not one.is_sweep_override()),
            settings=settings,
            compose=lambda overrides: point(self.loader.load_sweep_config(self.config, list(overrides))),
        )
        return self.task_function(self.study.first())
