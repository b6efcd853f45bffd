"""The ledger audit: was every (step, shard) applied exactly once, and from which version?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torchord.cache.errors import Impure, NotAuthentic, RecordDamaged
from torchord.cache.keyring import bare
from torchord.cache.ledger.distrusted import node_of
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import (
    CHECKS,
    GENESIS,
    LIED,
    PARTIAL_SUMS,
    UNLIKE,
    Head,
    LedgerEntry,
    VersionRecord,
)
from torchord.coordinator.master.reports import in_a_table
from torchord.coordinator.spec.plan import Plan

if TYPE_CHECKING:
    from torchord.cache.files.checkpoint import CheckpointStore


@dataclass(frozen=True, repr=False)
class Audit:
    """What `Run.verify` found.

    Attributes:
        ok: no discrepancy.
        steps: committed global steps that were checked.
        slots: gradient slots that were applied, each exactly once.
        duplicates_ignored: deliveries of a shard that changed nothing: a second delivery while the
            first was at work or done, or one that came after the commit.
        divergent: ignored duplicates and checks whose bytes differed from the applied ones (a broken
            purity).
        replayed: steps computed a second time after a training server's death.
        workers: worker id -> slots of its that were applied.
        partial_sums: sums over part of a step's shards that went into a version, each exactly once.
        checked: shards that were computed once more, in fresh copies of model and dataset, and had the
            same bytes (see `TrainingConfig.audit_fraction`).
        problems: each discrepancy in one sentence, first one first.
        reexecuted: steps that were computed again and compared, byte for byte.
    """

    ok: bool
    steps: int
    slots: int
    duplicates_ignored: int
    divergent: int = 0
    replayed: int = 0
    workers: dict[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    reexecuted: tuple[int, ...] = ()
    partial_sums: int = 0
    checked: int = 0

    def __repr__(self) -> str:
        return f"<Audit: {self}>"

    def _repr_html_(self) -> str:
        return in_a_table(
            "audit", [("ledger", str(self)), *(("problem", each) for each in self.problems[:20])]
        )

    def __str__(self) -> str:
        verdict = "clean" if self.ok else f"NOT clean: {self.problems[0]}"
        text = (
            f"ledger audit {verdict}: {self.steps} steps, {self.slots} gradient slots applied once each, "
            + (f"through {self.partial_sums} partial sums, " if self.partial_sums else "")
            + f"{self.checked} of them computed twice and compared, "
            + f"{self.duplicates_ignored} duplicates ignored, {self.replayed} steps replayed"
        )
        return f"{text}, {len(self.reexecuted)} steps computed again" if self.reexecuted else text


def audit(
    head: Head,
    entries: Sequence[LedgerEntry],
    plan: Plan | None,
    stored: VersionRecord | None,
    unlike: Sequence[str] = (),
    begins: tuple[int, str] = (0, GENESIS),
) -> Audit:
    """Check the ledger against itself, the plan and the stored parameters.

    Args:
        head: the run's head.
        entries: every ledger entry found, any order, versions above the head ignored.
        plan: which shards each step must have; None before the run was initialised.
        stored: record of the head version in the parameter cache, None if it is gone.
        unlike: what was said of processes that computed another first shard than the rest.
        begins: version and chain that the run begins with; not 0 for a fork.
    """
    problems: list[str] = []
    by_version: dict[int, LedgerEntry] = {}
    for entry in entries:
        if entry.version < 1:
            problems.append(f"an entry names version {entry.version}, which no step makes")
        elif entry.version <= head.version:
            first = by_version.setdefault(entry.version, entry)
            if first.to_json() != entry.to_json():  # as text: NaN equals NaN
                problems.append(f"version {entry.version} has two entries that differ")
    before, chain = begins
    slots = sums = checked = 0
    workers: dict[str, int] = {}
    expected = before + 1
    for version, found in [*sorted(by_version.items()), (head.version + 1, None)]:
        if version > expected:
            problems += _lacking(expected, version - 1)
            chain = ""
        expected = version + 1
        if found is None:
            break
        problems.extend(_entry_problems(found, chain, plan))
        chain = found.chain
        slots += len(found.slots)
        sums += len(found.notes.get(PARTIAL_SUMS, []))
        checked += sum(bool(compared) for _, _, compared in found.notes.get(CHECKS, []))
        for slot in found.slots:
            workers[slot.worker] = workers.get(slot.worker, 0) + 1
    if head.version and chain != head.chain and not problems:
        problems.append(f"the head's chain {head.chain} is not that of the last entry, {chain}")
    last = by_version.get(head.version)
    if stored is not None and last is not None and stored.digest != last.parameters:
        problems.append(f"the stored parameters of version {head.version} are not those that were committed")
    problems += unlike
    if head.error is not None and head.error.get("kind") == Impure.__name__:
        problems += [text for text in (str(head.error["message"]),) if text not in unlike]
    elif head.divergent:
        problems.append(
            f"{head.divergent} duplicate gradients had other bytes than the applied ones: the recipe is not "
            "pure, or some worker's torch, hardware, data or code differs"
        )
    return Audit(
        ok=not problems,
        steps=len(by_version),
        slots=slots,
        duplicates_ignored=head.duplicates + head.late,
        divergent=head.divergent,
        replayed=head.replayed,
        workers=workers,
        problems=tuple(problems),
        partial_sums=sums,
        checked=checked,
    )


def said_of_workers(claims: Mapping[str, str], entries: Iterable[LedgerEntry]) -> list[str]:
    """What was found out about workers of a run, a problem each.

    Of one that lied about a gradient, what it had computed before and nobody has computed twice: that is in
    the weights, true or not.

    Args:
        claims: as `Ledger.claims` has them.
        entries: the run's ledger.
    """
    found = [text for what, text in claims.items() if what.startswith(UNLIKE)]
    liars = {what.removeprefix(LIED): text for what, text in claims.items() if what.startswith(LIED)}
    if not liars:
        return found
    unseen: dict[str, list[tuple[int, int]]] = {node: [] for node in liars}
    for entry in sorted(entries, key=lambda entry: entry.version):
        seen = {shard for shard, _, compared in entry.notes.get(CHECKS, []) if compared}
        for slot in entry.slots:
            if (node := node_of(slot.worker)) in unseen and slot.shard not in seen:
                unseen[node].append((entry.version - 1, slot.shard))
    for node, places in unseen.items():
        if places:
            (step, shard), steps = places[0], sorted({step for step, _ in places})
            shown = " ".join(f"--replay {each}" for each in steps[:3])
            found.append(
                f"{liars[node]}; {len(places)} shards that it computed were used and not computed twice, the "
                f"first of them shard {shard} of step {step}: `torchord verify NAME {shown} ...` tells "
                "whether they are right"
            )
    return found


def _lacking(first: int, last: int) -> list[str]:
    if last - first < _MOST_NAMED:
        return [f"the entry of version {n} is missing from the ledger" for n in range(first, last + 1)]
    return [f"the entries of versions {first} to {last} are missing from the ledger"]


_MOST_NAMED = 100


def entry_texts(ledger: Ledger, version: int, disk: Callable[[], CheckpointStore]) -> dict[int, str]:
    """The ledger's entries up to a version as they are stored: those on disk, overridden by those in Redis.

    Args:
        disk: the run's checkpoints, asked where Redis has not all.
    """
    found = ledger.entry_texts()
    if len(found) < version:
        for text in disk().read_ledger():
            found.setdefault(LedgerEntry.from_json(bare(text)).version, text)
    return {number: found[number] for number in sorted(found) if number <= version}


def opened(ledger: Ledger, texts: Mapping[int, str], version: int) -> tuple[VersionRecord | None, list[str]]:
    """Look at the seals of what an audit reads, where this process has keys.

    Args:
        texts: the ledger's entries as they are stored, by version.
        version: whose record is to be read, too.

    Returns:
        (record of the version, None if there is none that can be believed; what is not authentic).
    """
    problems: list[str] = []
    if ledger.keyring.local:  # what lies on disk has no seal of such keys
        stored = ledger.entry_texts()
        texts = {number: text for number, text in texts.items() if number in stored}
    for number, text in texts.items():
        try:
            ledger.keyring.opened("server", ledger.places.entry(number), text)
        except NotAuthentic as error:
            problems.append(str(error))
    try:
        return ledger.version(version), problems
    except RecordDamaged as error:
        return None, [*problems, str(error)]


def _entry_problems(entry: LedgerEntry, chain: str, plan: Plan | None) -> list[str]:
    found = []
    name = f"version {entry.version}"
    if entry.computed_seal() != entry.seal:
        found.append(f"the entry of {name} was altered: its seal does not fit its contents")
    elif entry.computed_chain() != entry.chain:
        found.append(f"the entry of {name} was altered: its chain does not fit its contents")
    if chain and entry.previous != chain:
        found.append(f"{name} does not follow from the entry before: {entry.previous} instead of {chain}")
    if plan is None:
        return found
    if entry.version > plan.total_steps:
        return [*found, f"{name} is beyond the run's last step: it has {plan.total_steps}"]
    step = entry.version - 1
    shards = [slot.shard for slot in entry.slots]
    examples = [slot.examples for slot in entry.slots]
    if shards != list(range(plan.shards_in(step))):
        found.append(f"{name} applied shards {shards} instead of 0 to {plan.shards_in(step) - 1}, once each")
    elif examples != plan.shard_sizes(step):
        found.append(f"{name} applied {examples} examples by shard instead of {plan.shard_sizes(step)}")
    elif entry.examples != plan.examples(step):
        found.append(f"{name} applied {entry.examples} examples instead of {plan.examples(step)}")
    checks = [each[0] for each in entry.notes.get(CHECKS, [])]
    if checks != list(plan.checked(step)):
        found.append(f"{name} had the shards {checks} computed twice instead of {list(plan.checked(step))}")
    sums, expected = [each[0] for each in entry.notes.get(PARTIAL_SUMS, [])], plan.fan_in(step).partials
    if sums != list(expected):
        found.append(f"{name} applied the partial sums {sums} instead of {list(expected)}, once each")
    return found
