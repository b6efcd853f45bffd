"""What a run's rules say at its present version, before any step behind it: whether it is the last, or kept.

All of it follows from what the ledger holds, so a server that takes the run over comes to the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torchord.cache.errors import Fenced, NonFinite, RunError
from torchord.coordinator.runtime.faults import Hook
from torchord.coordinator.server.finish import Finish
from torchord.coordinator.server.warm_run import WarmRun
from torchord.coordinator.spec.stopping import MaxSteps, NotFinite, Verdict, over_evaluations, unread

log = logging.getLogger(__name__)


class Decisions:
    """Settles versions, for one training server.

    Args:
        finish: launches evaluations.
        checkpointed: writes the present version's checkpoint; False if that is to be tried again.
        fault: called with the name of each point of the protocol; tests use it to die there.
    """

    def __init__(self, finish: Finish, checkpointed: Callable[[WarmRun], bool], fault: Hook) -> None:
        self.finish = finish
        self.checkpointed = checkpointed
        self.fault = fault

    def settle(self, warm: WarmRun) -> str | None:
        """Find out what the rules say of the present version, and do it.

        Returns:
            What has to happen first, in words; None where the version is settled.

        Raises:
            Fenced: another server or a person acted.
            RunError: the run has no examples to evaluate, or does not measure what its rules read.
        """
        if not warm.open_verdict:
            return None
        version, config = warm.version, warm.context.config
        if warm.watch is not None and warm.watch.unread:
            raise RunError(f"run {warm.run!r}: {warm.watch.unread}")
        verdict = warm.watch.verdict if warm.watch is not None and warm.watch.version == version else None
        if warm.waits_at(version):
            evaluations = warm.ledger.evaluations()
            if version not in evaluations:
                if not self.finish.launch_evaluation(warm):
                    raise RunError(
                        f"run {warm.run!r}: its evaluation dataset is empty, so that its stop_when or keep "
                        "have nothing to read; give the recipe another one"
                    )
                return "evaluating"
            first = evaluations[min(evaluations)]
            if missing := unread(config.rules, config.keep_rule, "evaluations", first):
                raise RunError(f"run {warm.run!r}: {missing}")
            verdict = over_evaluations(config.rules, evaluations, version) or verdict
            if not self._kept(warm, evaluations):
                return "checkpoint not written"
        if verdict is not None:
            self.stop(warm, verdict)
        warm.settled = version
        return None

    def _kept(self, warm: WarmRun, evaluations: dict[int, dict[str, float]]) -> bool:
        """Have the present version kept if it is one of the best; False if that is to be tried again."""
        keep = warm.context.config.keep_rule
        if keep is None:
            return True
        warm.best = frozenset(keep.best(evaluations))
        if warm.version not in warm.best or warm.version in warm.checkpoints.versions():
            return True
        return self.checkpointed(warm)

    def stop(self, warm: WarmRun, verdict: Verdict) -> None:
        """Record that the run ends with the present version."""
        self.fault("server.before_stop")
        said = warm.ledger.stop(warm.version, rule=verdict.rule, reason=verdict.reason, token=warm.token)
        if said != "ok":
            raise Fenced(f"run {warm.run!r}: another server or a person acted before it stopped: {said}")
        log.info("run %s: stopped at version %d: %s", warm.run, warm.version, verdict.reason)
        warm.stopped_at = warm.version
        self.fault("server.after_stop")

    def say_limit(self, warm: WarmRun) -> None:
        """Record why a run whose steps are limited ends here, once it has taken them."""
        plan = warm.context.plan()
        if warm.stopped_at is None and plan.total_steps < plan.all_steps:
            reason = f"{plan.total_steps} steps are taken, of {plan.all_steps}"
            self.stop(warm, Verdict(MaxSteps.__name__, reason))

    def stops_for(self, warm: WarmRun, error: NonFinite) -> bool:
        """End the run with the present version if it shall end where the next step is not finite."""
        if not any(isinstance(rule, NotFinite) for rule in warm.context.config.rules):
            return False
        self.stop(
            warm, Verdict(NotFinite.__name__, str(error).removeprefix(f"run {warm.run!r}: ").split(";")[0])
        )
        return True
