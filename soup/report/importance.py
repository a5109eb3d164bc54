"""How much each swept key decides about the objective, by Optuna's PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255).

It needs neither torch nor scikit-learn, and asks which keys the best tenth of the points agree in.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from soup.report.keys import shown, value
from soup.report.point import Point, number

FEWEST = 8  # points; of fewer it says nothing but noise
ROUGH = 30


@dataclass(frozen=True)
class Importance:
    """`shares`: of each key, the most important first; together 1. `note`: why there is none, or how rough it is."""

    shares: tuple[tuple[str, float], ...]
    note: str


def importance(points: Sequence[Point], keys: Sequence[str]) -> Importance:
    """Of keys that differ among the points that have a value of the objective; of each task and metric alike."""
    scored = [point for point in points if point.value is not None]
    varied = [key for key in keys if len({shown(value(point, key)) for point in scored}) > 1]
    if len(varied) < 2:
        return Importance((), "Importance compares keys, and fewer than two differ here.")
    if len(scored) < FEWEST:
        return Importance(
            (), f"Importance needs {FEWEST} points with a value of the objective; {len(scored)} have one."
        )
    if len({point.value for point in scored}) == 1:
        return Importance((), "All points have the same value of the objective.")

    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions, coded = {}, {}
    for key in varied:
        found = [value(point, key) for point in scored]
        if all(number(one) for one in found):
            low, high = min(found), max(found)
            log = low > 0 and high / low >= 10
            distributions[key] = FloatDistribution(low, high, log=log)
            coded[key] = [float(one) for one in found]
        else:
            coded[key] = [shown(one) for one in found]
            distributions[key] = CategoricalDistribution(sorted(set(coded[key])))
    study = optuna.create_study(direction="minimize")
    study.add_trials(
        [
            create_trial(
                params={key: coded[key][place] for key in varied},
                distributions=distributions,
                value=float(point.rank),
            )
            for place, point in enumerate(scored)
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optuna's word that the evaluator is experimental
        shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    note = f"PED-ANOVA over {len(scored)} points."
    if len(scored) < ROUGH:
        note += f" Of fewer than {ROUGH} points this is a rough guide."
    return Importance(tuple((key, share) for key, share in shares.items()), note)
