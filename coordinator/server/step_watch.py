"""The rules of a run that may end it at any step, shown its ledger entry by entry."""

from __future__ import annotations

from collections.abc import Sequence

from torchord.cache.files.checkpoint import CheckpointStore
from torchord.cache.keyring import bare
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import LedgerEntry
from torchord.coordinator.spec.stopping import MaxSeconds, Rule, Verdict, Watch, step_figures, unread


class StepWatch:
    """Says of each entry whether the run ends with it; of equal ledgers the same.

    Args:
        rules: the run's.
        started_at: Unix time (s) at which version 0 was made.

    Attributes:
        version: the last that was shown, 0 before the first.
        verdict: what came of that.
        unread: which figure they read that the first step does not have, in a sentence; "" if there is none.
    """

    def __init__(self, rules: Sequence[Rule], started_at: float) -> None:
        self._watch = Watch(rules, "steps")
        self._seconds = min((rule.seconds for rule in rules if isinstance(rule, MaxSeconds)), default=None)
        self._started_at = started_at
        self._rules = rules
        self.unread = ""
        self.version = 0
        self.verdict: Verdict | None = None

    def see(self, entry: LedgerEntry) -> Verdict | None:
        """Show the rules one entry, the next or the last again; what they say of it."""
        if entry.version != self.version:
            self.version = entry.version
            figures = step_figures(entry.loss, entry.grad_norm, entry.metrics)
            if entry.version == 1:
                self.unread = unread(self._rules, None, "steps", figures)
            self.verdict = self._watch.see(entry.version, figures) or self._timed(entry)
        return self.verdict

    def catch_up(self, ledger: Ledger, checkpoints: CheckpointStore, version: int) -> None:
        """Show the rules all entries up to a version, from Redis and from disk.

        Raises:
            CheckpointError: a segment of the ledger on disk is damaged.
        """
        found = {} if self.version == version else ledger.entry_texts(self.version + 1, version)
        if len(found) < version - self.version:
            found = {**checkpoints.entries_between(self.version + 1, version), **found}
        for _, text in sorted(found.items()):
            self.see(LedgerEntry.from_json(bare(text)))

    def _timed(self, entry: LedgerEntry) -> Verdict | None:
        passed = entry.committed_at - self._started_at
        if self._seconds is None or passed < self._seconds:
            return None
        return Verdict(MaxSeconds.__name__, f"{passed:.0f} s have passed, of {self._seconds:g}")
