"""Whether a run ended where its own rules say, by what its ledger holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torchord.cache.ledger.records import Head, LedgerEntry
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.stopping import Verdict, Watch, step_figures


def unfounded(
    head: Head,
    config: TrainingConfig,
    evaluations: Mapping[int, Mapping[str, float]],
    entries: Iterable[LedgerEntry],
) -> list[str]:
    """What is wrong about the end of a run: what its figures do not say, or a verdict passed over.

    What the clock or a step that was never taken says is believed.

    Args:
        head: of the run.
        config: with the run's rules.
        evaluations: figures by version.
        entries: the run's ledger.
    """
    if not config.rules:
        return []
    said = _verdicts(head, config, evaluations, entries)
    stopped = head.stopped
    first = min(said, default=None)
    if first is not None and first < head.version:
        verdict = said[first]
        return [
            f"the run went on behind version {first}, with which {verdict.rule} ends it: {verdict.reason}"
        ]
    if stopped is None or stopped["rule"] in ("MaxSeconds", "NotFinite", "MaxSteps"):
        return []
    if stopped["version"] not in said or said[stopped["version"]].reason != stopped["reason"]:
        where = f"version {stopped['version']} ({stopped['reason']})"
        return [f"the run was stopped at {where}, which its figures do not say"]
    return []


def _verdicts(
    head: Head,
    config: TrainingConfig,
    evaluations: Mapping[int, Mapping[str, float]],
    entries: Iterable[LedgerEntry],
) -> dict[int, Verdict]:
    """At which versions the rules end the run, with what they say."""
    found: dict[int, Verdict] = {}
    steps, watch = Watch(config.rules, "steps"), Watch(config.rules, "evaluations")
    for entry in sorted(entries, key=lambda entry: entry.version):
        verdict = steps.see(entry.version, step_figures(entry.loss, entry.grad_norm, entry.metrics))
        if verdict is not None and entry.version <= head.version:
            found[entry.version] = verdict
    for version in sorted(evaluations):
        if version <= head.version and config.evaluates(version):
            verdict = watch.see(version, evaluations[version])
            if verdict is not None:
                found[version] = verdict
    return found
