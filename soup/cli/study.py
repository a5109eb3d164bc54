"""A search with `hydra/sweeper=optuna`: its study on disk, and a launcher's queue that is fed from it.

A trial is written down with the id of its run before the run starts, in one line; what it came to is read from the
run's folder. So a search that was killed goes on: trials without an end are those whose runs are started again.
"""

from __future__ import annotations

import hashlib
import json
import os
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from soup import sweep as sweeps
from soup.cli import points as before
from soup.cli.check import Checked, checked
from soup.cli.compose import Point
from soup.cli.multirun import PLANNED, Say, admit, alike, results
from soup.cli.space import Proposer
from soup.cli.table import number
from soup.errors import Problem, Refused
from soup.record import NOT_IDENTITY, Run, source_hash
from soup.sweep import FOLDER, Sweep, SweepPoint, metric, sign

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

NAME = "soup"
BUSY_S = 1.0
Settle = Callable[[Checked], Run]


def search(
    proposer: Proposer,
    points: Sequence[Point],
    found: Sequence[Checked | Refused],
    args: Namespace,
    settle: Settle,
    say: Say,
) -> int:
    """Shows the points that need no results, then runs all of the study that is not done; returns the exit status."""
    from soup.cli.loader import launcher

    ready = admit(points, found, args, say)
    config = ready[0].config
    objective, launch = config.run.objective, dict(config.tree["launch"])
    _refuse_odd(proposer, objective, launch, config.run.resume)
    launch["wait"] = True  # a point is proposed once others have ended
    runs = [settle(one) if isinstance(one, Checked) else None for one in found]
    for line in before.table(points, found, runs, pruner=args.pruner is not None):
        say(line)
    trials = proposer.settings.n_trials
    if trials > len(points):
        say(f"the first {len(points)} of {trials} points; the others follow from results")
    root = Path(config.run.root).absolute()
    sweep = Sweep(root / FOLDER / _identity(proposer, objective, launch["name"]))
    sweep.folder.mkdir(parents=True, exist_ok=True)
    with _alone(sweep, say):
        feed = Feed(proposer, sweep, launch, ready, args, settle, say)
        again = feed.resumed()
        say(f"\nsearch {sweep.id}: {feed.told()}")
        status = launcher(launch["name"]).start(sweep, say, again, feed)
        feed.settle(())
        say(f"\nsearch {sweep.id}: {feed.told()}")
    ended = results(sweep, say)
    return status or ended


class Feed:
    """What a launcher's queue asks for more points."""

    def __init__(
        self,
        proposer: Proposer,
        sweep: Sweep,
        launch: dict[str, Any],
        ready: Sequence[Checked],
        args: Namespace,
        settle: Settle,
        say: Say,
    ):
        self.proposer, self.sweep, self.launch, self.args = proposer, sweep, launch, args
        self.first, self.place, self.say = ready[0], settle, say
        self.objective = self.first.config.run.objective
        self.direction = "minimize" if sign(self.objective) > 0 else "maximize"
        self.study = _open(sweep.folder / "study.log", self.direction)
        self.points: dict[str, SweepPoint] = {}
        self.invalid: list[dict[str, Any]] = []

    def resumed(self) -> list[str]:
        """Takes up the study as it was left; returns the ids of the runs that are not done.

        Raises:
            Refused: a trial's run is another today, since its data or code changed, or it is invalid today.
        """
        states = {}
        for trial in self._asked():
            if "run" not in trial.user_attrs:
                self.invalid.append(
                    {"overrides": list(self.proposer.words(trial)), "why": trial.user_attrs["why"]}
                )
                continue
            (one,) = checked([self.proposer.point(trial)], train=True)
            if isinstance(one, Refused):
                raise one
            run = self.place(one)
            if run.id != trial.user_attrs["run"]:
                why = f"point {trial.number + 1} of this study is run {trial.user_attrs['run']}, and would be {run.id}"
                fix = f"another run.root, or remove {self.sweep.folder}, which begins a new study"
                raise Refused(Problem(key="hydra/sweeper", value="optuna", why=why, fix=fix))
            self._list(trial, one, run)
            states[run.id] = run.state()
        self._record()
        self.settle(())
        return [run for run, state in states.items() if state not in self.sweep.done]

    def more(self, count: int, going: Collection[str]) -> list[SweepPoint]:
        """Points to start, at most `count`; none once there are `n_trials`. `going`: runs that have not ended."""
        self.settle(going)
        settings = self.proposer.settings
        if settings.n_jobs is not None:
            count = min(count, settings.n_jobs - len(going))
        new: list[SweepPoint] = []
        while len(new) < count and len(self._asked()) < settings.n_trials:
            point, busy = self._ask(), {*going, *(one.run for one in new)}
            if point is None or self.sweep.run(point).state() in self.sweep.done:
                self.settle(busy)
            elif point.run not in busy:
                new.append(point)
        return new

    def settle(self, going: Collection[str]) -> None:
        """Tells the study what ended runs came to. One that was stopped has not ended: its trial stays open."""
        told: set[tuple[str, bool]] = {
            (trial.user_attrs["run"], trial.state.name == "COMPLETE")
            for trial in self._trials()
            if trial.state.is_finished() and "run" in trial.user_attrs
        }
        for trial in self._asked():
            run_id = trial.user_attrs.get("run")
            if run_id is None or run_id in going:
                continue
            run = self.sweep.run(self.points[run_id])
            state, result = run.look()
            if state == "pruned" and not self.sweep.pruned:
                continue  # by another sweep; here it goes on
            if not trial.state.is_finished():
                self._tell(trial, run, state, result or {})
            elif state == "finished" and (run_id, True) not in told and trial.user_attrs["ended"] != state:
                self._tell_retried(trial, result or {})

    def told(self) -> str:
        """How the study stands."""
        counts: dict[str, int] = {}
        for trial in self._asked():
            end = trial.user_attrs.get("ended", "invalid" if "run" not in trial.user_attrs else "open")
            counts[end] = counts.get(end, 0) + 1
        stands = ", ".join(f"{count} {end}" for end, count in counts.items()) or "no points yet"
        done = [one for one in self._trials() if one.state.name == "COMPLETE"]
        if done:
            best = min(done, key=lambda one: sign(self.objective) * one.value)
            words = " ".join(self.proposer.words(best))
            stands += f"; best: {metric(self.objective)} {number(best.value)}, {words}"
        return stands

    def _ask(self) -> SweepPoint | None:
        """One more trial: its point, or `None` where that is invalid.

        Raises:
            Refused: it is invalid, and launch.invalid says that this ends the sweep.
        """
        trials, asked = self._trials(), len(self._asked())
        trial = self.proposer.propose(trials, asked, self.direction)
        words = self.proposer.words(trial)
        try:
            (one,) = checked([self.proposer.point(trial)], train=True)
        except Refused as refused:
            one = refused
        if isinstance(one, Refused):
            if self.launch["invalid"] != "skip":
                why = f"point {asked + 1} is invalid: {' '.join(words)}"
                fix = "a smaller space, or launch.invalid=skip, which tells the study so and goes on"
                raise Refused([*one.problems, Problem(key="launch.invalid", why=why, fix=fix)])
            self.say(f"invalid: {' '.join(words)}: {one.problems[0].why}")
            self._refused(trial, words, one)
            return None
        alike([self.first, one])
        run = self.place(one)
        trial.user_attrs = {"run": run.id}
        point = self._list(trial, one, run)
        self._record()  # before the trial: a run without one is harmless, a trial without its run is not
        self.study.add_trial(trial)
        return point

    def _refused(self, trial: FrozenTrial, words: Sequence[str], why: Refused) -> None:
        from optuna.trial import TrialState

        # As pruned without a value, Optuna holds it for bad, and proposes fewer like it; what FAILs it forgets.
        self.study.add_trial(_ended(trial, TrialState.PRUNED, user_attrs={"why": str(why)}))
        self.invalid.append({"overrides": list(words), "why": str(why)})
        self._record()

    def _tell(self, trial: FrozenTrial, run: Run, state: str, result: dict[str, Any]) -> None:
        from optuna.trial import Trial, TrialState

        if state not in ("finished", "pruned", "diverged", "failed"):
            return
        name = metric(self.objective)
        handle = Trial(self.study, trial._trial_id)
        for line in run.lines():
            if name in line and line["step"] not in trial.intermediate_values:
                handle.report(line[name], line["step"])
        value, end = result.get(name), TrialState.COMPLETE
        if (
            state != "finished"
        ):  # Optuna holds a diverged point for bad, and learns nothing from one that failed
            end = TrialState.FAIL if state == "failed" else TrialState.PRUNED
            handle.set_user_attr("why", str(result.get("error", "")))
        elif not isinstance(value, int | float) or value != value:
            end = TrialState.FAIL
            handle.set_user_attr("why", f"logged no {name}" if value is None else f"{name} is {value}")
        handle.set_user_attr("ended", state)
        self.study.tell(handle, value if end == TrialState.COMPLETE else None, state=end)

    def _tell_retried(self, trial: FrozenTrial, result: dict[str, Any]) -> None:
        """A run that had failed and has finished since: what has ended stays, so it is a trial beside the first."""
        from optuna.trial import TrialState

        value = result.get(metric(self.objective))
        if isinstance(value, int | float) and value == value:
            attrs = {"run": trial.user_attrs["run"], "ended": "finished", "retried": trial.number}
            self.study.add_trial(_ended(trial, TrialState.COMPLETE, value=value, user_attrs=attrs))

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _asked(self) -> list[FrozenTrial]:
        """Without those that stand for a run that finished at a second attempt."""
        return [trial for trial in self._trials() if "retried" not in trial.user_attrs]

    def _list(self, trial: FrozenTrial, one: Checked, run: Run) -> SweepPoint:
        planned, launch = one.plan.to_dict(), dict(one.config.tree["launch"]) | {"wait": True}
        point = SweepPoint(
            run=run.id,
            overrides=self.proposer.words(trial),
            planned={key: planned[key] for key in PLANNED},
            launch={key: value for key, value in launch.items() if self.launch.get(key) != value},
        )
        return self.points.setdefault(run.id, point)

    def _record(self) -> None:
        sweeps.record(
            self.sweep.root,
            command=self.args.argv,
            settings=self.launch,
            objective=self.objective,
            points=list(self.points.values()),
            invalid=self.invalid,
            pruner=self.args.pruner,
            identity=self.sweep.id,
        )


def _ended(trial: FrozenTrial, state: Any, **details: Any) -> FrozenTrial:
    from optuna.trial import create_trial

    return create_trial(state=state, params=trial.params, distributions=trial.distributions, **details)


def _open(file: Path, direction: str) -> Study:
    """The study in a file that this process alone writes, until it ends."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    class Held(JournalFileOpenLock):
        """Optuna's own locks outlive a process that is killed."""

        def acquire(self) -> bool:
            return True

        def release(self) -> None:
            return None

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _cut(file)
    storage = JournalStorage(JournalFileBackend(str(file), lock_obj=Held(str(file))))
    return optuna.create_study(
        study_name=NAME,
        storage=storage,
        direction=direction,
        sampler=optuna.samplers.RandomSampler(),
        load_if_exists=True,
    )


def _cut(file: Path) -> None:
    """Takes off a last line that a crash cut short, to which the next one would be appended."""
    if not file.exists():
        return
    text = file.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(file, whole)


@contextmanager
def _alone(sweep: Sweep, say: Say) -> Iterable[None]:  # type: ignore[misc]
    """One process has a study at a time; the lock ends with it."""
    lock = FileLock(sweep.folder / ".study.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process has search {sweep.id}: waiting for it")
        lock.acquire(poll_interval=BUSY_S)
    try:
        yield
    finally:
        lock.release()


def _refuse_odd(proposer: Proposer, objective: str, launch: dict[str, Any], resume: str) -> None:
    problems = []
    named = proposer.settings.direction
    right = "minimize" if sign(objective) > 0 else "maximize"
    if named not in (None, right):
        why = f"contradicts run.objective={objective}, which is to {right}"
        other = metric(objective) if sign(objective) < 0 else f"-{objective}"
        problems.append(
            Problem(
                key="hydra.sweeper.direction", value=named, why=why, fix=f"run.objective={other}, or drop it"
            )
        )
    if launch["name"] == "local" and not launch["wait"]:
        why = "a search proposes points by what others came to, so it stays"
        problems.append(Problem(key="launch.wait", value=False, why=why, fix="drop it"))
    if resume == "never":
        why = "a search goes on with the runs that it has"
        problems.append(
            Problem(key="run.resume", value=resume, why=why, fix="another run.root, or another seed")
        )
    if launch.get("dry_run"):
        why = "a search has its points one after the other"
        problems.append(Problem(key="launch.dry_run", value=True, why=why, fix="drop it"))
    if problems:
        raise Refused(problems)


def _identity(proposer: Proposer, objective: str, launch: str) -> str:
    """The study's id: its space, its sampler, and one point with its data. With more `n_trials` it is the same."""
    from optuna.distributions import distribution_to_json

    try:
        point = proposer.corner()
        (one,) = checked([point], train=True)
    except Refused as refused:
        stands: Any = str(refused)
    else:
        run = None if isinstance(one, Refused) else before.whereabouts(one)
        stands = (
            {key: node for key, node in point.tree.items() if key not in NOT_IDENTITY}
            if run is None
            else run.id
        )
    axes = {axis.key: distribution_to_json(axis.distribution) for axis in proposer.axes}
    text = json.dumps([axes, dict(proposer.settings.sampler), objective, launch, stands, source_hash()])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
