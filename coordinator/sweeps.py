"""`sweep`: Optuna says what to try, and the fleet tries it, several trials at a time.

Each trial is a run like any other, and shares the fleet with the others by weight and priority. A sweep's own
state is the study's: what is asked for trial n follows from the values of the trials up to n - `parallel`,
which are told in the trials' order and not in that of their ends. So a seeded sampler proposes the same
trials on any fleet, whoever dies; and a sweep that is begun again under its name finds its runs, and goes on.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchord.cache.errors import CacheUnreachable, InvalidInput, RunNotFound
from torchord.coordinator.master.master import Master
from torchord.coordinator.master.run import Run
from torchord.coordinator.runtime.known_runs import record_of
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.recipe import Recipe

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

Make = Callable[[Any], tuple[Recipe, TrainingConfig]]

_POLL_SECONDS = 0.1
_BY_CHANCE = ("Poison", "RunError", "ChunkLost", "VersionMissing", "CheckpointError")
"""Kinds of failures that another try may not meet: workers that died, bytes that were lost."""


def sweep(
    master: Master,
    make: Make,
    *,
    name: str,
    trials: int,
    study: optuna.Study | None = None,
    metric: str = "loss",
    direction: str = "minimize",
    parallel: int = 4,
    seed: int = 0,
    retries: int = 2,
    pruned_by: Collection[str] = ("NotFinite",),
) -> optuna.Study:
    """Have the fleet try what Optuna proposes; returns the study.

    Args:
        master: of the fleet.
        make: (optuna.Trial) -> (recipe, config) of the trial, by what it asks the trial for.
        name: of the sweep; its runs are called NAME-0, NAME-1, ... Begun again under its name, with the same
            arguments, it goes on.
        trials: how many, those included that the study has already.
        study: Optuna's; None: one in memory, with a TPE sampler of `seed`.
        metric: what the study judges by: of a run's last evaluation, or of its last step what that has not.
            Each evaluation is reported as an intermediate value.
        direction: "minimize" or "maximize", of the study that is made here.
        parallel: trials at a time, at least 1. What is proposed depends on it, not on the fleet.
        retries: how often a run is resumed that failed by chance: its workers died again and again, or bytes
            were lost. One that fails by itself (its code raises, its loss is NaN) is a failed trial at once.
        pruned_by: names of the rules of `TrainingConfig.stop_when` after which a trial counts as pruned;
            after others it counts by its value. The ledger decides, so that a trial is pruned at the same
            step on any fleet.

    Raises:
        InvalidInput: an argument is out of range, or Optuna is not installed.
        Exception: whatever `make` raises, and `Master.submit`.

    Example:
        >>> study = sweep(master, make, name="rates", trials=20)  # doctest: +SKIP
        >>> study.best_trial.params  # doctest: +SKIP
    """
    for word, value in (("trials", trials), ("parallel", parallel)):
        if type(value) is not int or value < 1:
            raise InvalidInput(f"{word} must be a whole number of at least 1, not {value!r:.60}")
    optuna = _optuna()
    if study is None:
        study = optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=seed))
    there = study.get_trials(deepcopy=False)
    begun = [each for each in there if each.state == optuna.trial.TrialState.RUNNING]
    again = deque(optuna.trial.Trial(study, each._trial_id) for each in begun)
    pending: deque[_Attempt] = deque()
    asked = len(there) - len(again)
    while asked < trials or pending:
        if asked < trials and len(pending) < parallel:
            trial = again.popleft() if again else study.ask()
            asked += 1
            recipe, config = _made(study, trial, make)
            run = master.submit(recipe, config, name=f"{name}-{trial.number}")
            pending.append(_Attempt(master, trial, run, recipe, config, retries))
            continue
        for attempt in pending:
            attempt.look(metric)
        if pending[0].ended is None:
            time.sleep(_POLL_SECONDS)
            continue
        _tell(optuna, study, pending.popleft(), pruned_by)
    return study


@dataclass(frozen=True)
class _End:
    """How a trial's run ended.

    Attributes:
        value: of the metric; NaN where there is none.
        reports: version -> value of each evaluation.
        rule: name of the rule that ended it, "" for none.
        error: why it failed, "" if it did not.
    """

    value: float
    reports: dict[int, float]
    rule: str = ""
    error: str = ""


class _Attempt:
    """A trial and its run."""

    def __init__(
        self, master: Master, trial: Any, run: Run, recipe: Recipe, config: TrainingConfig, retries: int
    ) -> None:
        self.trial = trial
        self.ended: _End | None = None
        self._master = master
        self._run = run
        self._made = (recipe, config)
        self._retries = retries

    def look(self, metric: str) -> None:
        """See whether the run has ended; one that failed by chance goes on."""
        if self.ended is not None:
            return
        try:
            ledger = self._run._ledger
            head = ledger.head()
            if head.status == "failed" and self._again(str((head.error or {}).get("kind", ""))):
                self._run.resume()
            elif head.status in ("done", "failed", "cancelled"):
                evaluations = ledger.evaluations()
                known = record_of(ledger, head, evaluations)
                values = known.metrics if known.loss is None else {"loss": known.loss, **known.metrics}
                reports = {at: found[metric] for at, found in evaluations.items() if metric in found}
                rule = "" if head.stopped is None else str(head.stopped["rule"])
                error = "" if head.status == "done" else known.error or head.status
                self.ended = _End(values.get(metric, math.nan), reports, rule, error)
        except RunNotFound:  # Redis has lost it: from its checkpoint, or from the start
            try:
                self._run.resume()
            except RunNotFound:
                self._run = self._master.submit(*self._made, name=self._run.name)
        except CacheUnreachable as error:
            log.warning("run %s: %s", self._run.name, error)

    def _again(self, kind: str) -> bool:
        self._retries -= kind in _BY_CHANCE
        return kind in _BY_CHANCE and self._retries >= 0


def _made(study: Any, trial: Any, make: Make) -> tuple[Recipe, TrainingConfig]:
    try:
        recipe, config = make(trial)
    except BaseException:
        study.tell(trial, state=_optuna().trial.TrialState.FAIL)
        raise
    return recipe, config


def _tell(optuna: Any, study: Any, attempt: _Attempt, pruned_by: Collection[str]) -> None:
    end, state = attempt.ended, optuna.trial.TrialState
    assert end is not None
    for version, value in sorted(end.reports.items()):
        if not math.isnan(value):
            attempt.trial.report(value, version)
    if end.error or (end.rule not in pruned_by and math.isnan(end.value)):
        why = end.error or "its metric is NaN, or not there"
        log.warning("trial %d has failed: %s", attempt.trial.number, why)
        attempt.trial.set_user_attr("error", why)
        study.tell(attempt.trial, state=state.FAIL)
    elif end.rule in pruned_by:
        study.tell(attempt.trial, state=state.PRUNED)
    else:
        study.tell(attempt.trial, end.value)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise InvalidInput("sweep() needs Optuna; run: pip install 'torchord[sweeps]'") from None
    return optuna
