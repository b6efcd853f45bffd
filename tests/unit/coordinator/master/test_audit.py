"""The audit of a ledger: a clean one passes, and whatever is done to one is found and named."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.control import SPEC, digest, entry, history, record, slot
from torchord.cache.errors import RecordDamaged
from torchord.cache.ledger.records import CHECKS, GENESIS, Head, LedgerEntry, SlotReceipt, VersionRecord
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.coordinator.master.audit import Audit, audit
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan

STEPS, SHARDS = 6, 4
CONFIG = TrainingConfig(batch_size=16, shards=SHARDS, audit_fraction=0)
PLAN = Plan(96, CONFIG)  # 6 steps of 4 shards of 4 examples


def head(entries: list[LedgerEntry], **changes: Any) -> Head:
    """The head of a run whose ledger is this."""
    ledger = MemoryLedger(MemoryPlane(), "run-1")
    ledger.create(SPEC, incarnation="life")
    last = entries[-1] if entries else None
    state = {"version": last.version if last else 0, "chain": last.chain if last else GENESIS}
    return replace(ledger.head(), status="running", **{**state, **changes})


def clean() -> list[LedgerEntry]:
    return history(STEPS, SHARDS)


def found(entries: list[LedgerEntry], of: Head | None = None, stored: VersionRecord | None = None) -> Audit:
    """The audit of these entries under the head of the clean ledger."""
    return audit(of or head(clean()), entries, PLAN, stored)


def rewritten(
    entries: list[LedgerEntry], version: int, change: Callable[[LedgerEntry], LedgerEntry]
) -> list[LedgerEntry]:
    """The ledger of somebody who changes one entry and seals and chains all that follow anew."""
    made = entries[: version - 1]
    for old in entries[version - 1 :]:
        previous = made[-1].chain if made else GENESIS
        made.append(replace(change(old) if old.version == version else old, previous=previous).sealed())
    return made


def with_slots(made: LedgerEntry, slots: list[SlotReceipt]) -> LedgerEntry:
    return replace(made, slots=tuple(slots), examples=sum(one.examples for one in slots))


# --- what is right ----------------------------------------------------------------------------------


def test_a_clean_ledger_passes() -> None:
    result = found(clean())
    assert result.ok
    assert (result.steps, result.slots, result.problems) == (STEPS, STEPS * SHARDS, ())
    assert result.workers == {"w0": STEPS * SHARDS}
    assert "clean: 6 steps, 24 gradient slots applied once each" in str(result)


@given(st.permutations(clean()))
def test_the_order_in_which_entries_are_read_does_not_matter(entries: list[LedgerEntry]) -> None:
    assert found(list(entries)).ok


def test_a_run_that_has_not_begun_passes() -> None:
    assert audit(head([]), [], None, None).ok
    assert audit(head([]), [], PLAN, None).ok


def test_an_entry_read_twice_is_one_entry() -> None:
    """A version may lie in Redis and on disk."""
    again = rewritten(clean(), 3, lambda made: replace(made, loss=float("nan")))
    assert found([*again, LedgerEntry.from_json(again[2].to_json())]).ok
    result = found([*clean(), clean()[2]])
    assert result.ok
    assert (result.steps, result.slots) == (STEPS, STEPS * SHARDS)


def test_entries_above_the_head_do_not_count() -> None:
    """They are left over from a rollback; the replay overwrites them."""
    entries = clean()
    result = audit(head(entries[:4]), entries, PLAN, None)
    assert result.ok
    assert result.steps == 4


def test_a_ragged_epoch_passes() -> None:
    plan = Plan(21, TrainingConfig(batch_size=8, shards=3, epochs=2, audit_fraction=0))
    entries: list[LedgerEntry] = []
    for step in range(plan.total_steps):
        slots = [slot(step, shard, examples=size) for shard, size in enumerate(plan.shard_sizes(step))]
        entries.append(entry(step + 1, slots, entries[-1].chain if entries else GENESIS))
    assert audit(head(entries), entries, plan, None).ok


def test_it_counts_what_was_ignored_and_replayed() -> None:
    of = head(clean(), duplicates=3, late=2, replayed=4)
    result = found(clean(), of)
    assert (result.ok, result.duplicates_ignored, result.replayed) == (True, 5, 4)
    assert "5 duplicates ignored, 4 steps replayed" in str(result)


def test_it_counts_slots_by_worker() -> None:
    slots = [slot(0, shard, worker=f"w{shard % 2}") for shard in range(3)]
    entries = [entry(1, slots)]
    assert audit(head(entries), entries, None, None).workers == {"w0": 2, "w1": 1}


# --- entries that are missing or too many ---------------------------------------------------------------


@pytest.mark.parametrize("version", range(1, STEPS + 1))
def test_a_missing_entry_is_named(version: int) -> None:
    result = found([made for made in clean() if made.version != version])
    assert not result.ok
    assert result.problems[0] == f"the entry of version {version} is missing from the ledger"
    assert len(result.problems) == 1, "what follows from it is not a problem of its own"
    assert f"NOT clean: {result.problems[0]}" in str(result)


def test_an_empty_ledger_misses_every_entry() -> None:
    assert len(found([]).problems) == STEPS


@pytest.mark.parametrize("last", [False, True])
def test_two_entries_of_one_version_are_named(last: bool) -> None:
    other = replace(clean()[2], loss=9.0).sealed()
    entries = [*clean(), other] if last else [other, *clean()]
    assert "version 3 has two entries that differ" in found(entries).problems


@pytest.mark.parametrize("version", [0, -1])
def test_an_entry_of_no_step_is_named(version: int) -> None:
    odd = replace(clean()[0], version=version).sealed()
    result = found([*clean(), odd])
    assert result.problems == (f"an entry names version {version}, which no step makes",)
    assert result.steps == STEPS


def test_an_entry_beyond_the_last_step_is_named() -> None:
    entries = history(STEPS + 1, SHARDS)
    result = found(entries, head(entries))
    assert result.problems == ("version 7 is beyond the run's last step: it has 6",)


# --- entries that were altered ----------------------------------------------------------------------------


def altered(value: Any) -> Any:
    """Another value of the same type."""
    if value is None:
        return 1.0
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1:] != "0" else "1")
    if isinstance(value, dict):
        return {**value, "more": 1}
    return value[:-1]


ENTRY_FIELDS = [field.name for field in fields(LedgerEntry) if field.name != "version"]
SLOT_FIELDS = [field.name for field in fields(SlotReceipt)]


@pytest.mark.parametrize("name", ENTRY_FIELDS)
@pytest.mark.parametrize("version", [1, 3, STEPS])
def test_an_altered_field_is_found(name: str, version: int) -> None:
    entries = clean()
    before = entries[version - 1]
    entries[version - 1] = replace(before, **{name: altered(getattr(before, name))})
    result = found(entries)
    assert not result.ok
    assert f"version {version} was altered: its seal does not fit its contents" in result.problems[0]


@pytest.mark.parametrize("name", SLOT_FIELDS)
def test_an_altered_slot_is_found(name: str) -> None:
    entries = clean()
    first, *rest = entries[2].slots
    entries[2] = replace(entries[2], slots=(replace(first, **{name: altered(getattr(first, name))}), *rest))
    assert "version 3 was altered" in found(entries).problems[0]


def test_an_altered_version_is_an_entry_that_is_missing() -> None:
    entries = clean()
    entries[2] = replace(entries[2], version=99)
    assert "version 3 is missing" in found(entries).problems[0]


def test_an_entry_sealed_anew_does_not_fit_the_one_after() -> None:
    entries = clean()
    entries[2] = replace(entries[2], parameters=digest("other")).sealed()
    (problem,) = found(entries).problems
    assert "version 4 does not follow from the entry before" in problem


def test_a_field_outside_the_chain_is_guarded_by_the_seal_alone() -> None:
    """Loss, times and workers are no part of what a replay must meet."""
    entries = clean()
    entries[2] = replace(entries[2], loss=9.0).sealed()
    assert found(entries).ok
    assert replace(clean()[2], loss=9.0).computed_chain() == clean()[2].chain


def test_a_chain_that_is_not_its_own_is_found() -> None:
    entries = clean()
    made = replace(entries[2], chain=digest("made up"))
    entries[2] = replace(made, seal=made.computed_seal())
    assert "version 3 was altered: its chain does not fit its contents" in found(entries).problems[0]


@pytest.mark.parametrize("version", range(1, STEPS + 1))
def test_a_ledger_rewritten_from_some_entry_on_does_not_end_at_the_head(version: int) -> None:
    entries = rewritten(clean(), version, lambda made: replace(made, parameters=digest("other")))
    (problem,) = found(entries).problems
    assert problem.startswith("the head's chain")


def test_parameters_that_are_not_the_committed_ones_are_found() -> None:
    right = record(STEPS, clean()[-1].chain)
    assert found(clean(), stored=right).ok
    wrong = replace(right, digest=digest("other"))
    assert found(clean(), stored=wrong).problems == (
        "the stored parameters of version 6 are not those that were committed",
    )


# --- shards that were left out, doubled, moved; wrong examples ----------------------------------------------


@pytest.mark.parametrize(
    ("shards", "shown"),
    [
        ([0, 1, 2], "[0, 1, 2]"),
        ([0, 1, 2, 2], "[0, 1, 2, 2]"),
        ([0, 1, 2, 3, 3], "[0, 1, 2, 3, 3]"),
        ([1, 0, 2, 3], "[1, 0, 2, 3]"),
        ([0, 1, 2, 4], "[0, 1, 2, 4]"),
        ([], "[]"),
    ],
)
def test_wrong_shards_are_named_even_if_all_is_sealed_and_chained_anew(shards: list[int], shown: str) -> None:
    spare = replace(clean()[2].slots[0], shard=4)

    def change(made: LedgerEntry) -> LedgerEntry:
        return with_slots(made, [(*made.slots, spare)[shard] for shard in shards])

    entries = rewritten(clean(), 3, change)
    (problem,) = found(entries, head(entries)).problems
    assert problem == f"version 3 applied shards {shown} instead of 0 to 3, once each"


def test_a_shard_applied_in_two_steps_is_found_by_its_examples() -> None:
    plan = Plan(90, CONFIG)  # the last step has 10 examples
    entries = rewritten(clean(), STEPS, lambda made: made)
    problems = audit(head(entries), entries, plan, None).problems
    assert problems == ("version 6 applied [4, 4, 4, 4] examples by shard instead of [3, 3, 2, 2]",)


def test_examples_moved_from_one_shard_to_another_are_found() -> None:
    def change(made: LedgerEntry) -> LedgerEntry:
        one, two, *rest = made.slots
        return with_slots(made, [replace(one, examples=3), replace(two, examples=5), *rest])

    entries = rewritten(clean(), 2, change)
    (problem,) = found(entries, head(entries)).problems
    assert problem == "version 2 applied [3, 5, 4, 4] examples by shard instead of [4, 4, 4, 4]"


def test_a_sum_that_is_not_that_of_the_shards_is_found() -> None:
    entries = rewritten(clean(), 2, lambda made: replace(made, examples=17))
    assert found(entries, head(entries)).problems == ("version 2 applied 17 examples instead of 16",)


# --- what was computed twice ------------------------------------------------------------------------


def checked(changes: dict[int, list[list[Any]]]) -> tuple[Audit, Plan]:
    """The audit of a run with checks, whose entries note those of the plan but for some versions."""
    plan = Plan(96, replace(CONFIG, audit_fraction=0.01))
    entries: list[LedgerEntry] = []
    for made in history(STEPS, SHARDS):
        noted = [[shard, "w1", True] for shard in plan.checked(made.version - 1)]
        noted = changes.get(made.version, noted)
        previous = entries[-1].chain if entries else GENESIS
        entries.append(replace(made, notes={CHECKS: noted} if noted else {}, previous=previous).sealed())
    return audit(head(entries), entries, plan, None), plan


def test_it_counts_the_shards_that_were_compared() -> None:
    result, plan = checked({})
    assert result.ok and result.checked == 4 + 3
    assert "24 gradient slots applied once each, 7 of them computed twice and compared" in str(result)
    assert [len(plan.checked(step)) for step in range(STEPS)] == [4, 1, 1, 1, 0, 0]


def test_unlike_workers_that_were_admitted_are_not_counted() -> None:
    result, _ = checked({1: [[shard, "w1", shard < 2] for shard in range(4)]})
    assert result.ok and result.checked == 2 + 3


def test_a_version_without_its_checks_is_found() -> None:
    result, plan = checked({2: []})
    assert result.problems == (
        f"version 2 had the shards [] computed twice instead of {list(plan.checked(1))}",
    )


def test_a_run_that_a_check_has_stopped_says_so_and_no_more() -> None:
    told = "run 'r' is not pure: shard 1 of step 6 ..."
    result = found(clean(), head(clean(), divergent=1, error={"kind": "Impure", "message": told}))
    assert not result.ok and result.problems == (told,)


# --- counters, and all at once -------------------------------------------------------------------


def test_divergent_duplicates_are_a_problem_of_their_own() -> None:
    result = found(clean(), head(clean(), duplicates=2, divergent=1))
    assert not result.ok
    assert "1 duplicate gradients had other bytes" in result.problems[0]
    assert result.divergent == 1


def test_every_problem_is_listed_first_one_first() -> None:
    entries = clean()
    entries[1] = replace(entries[1], loss=9.0)
    del entries[3]
    result = found(entries, head(clean(), divergent=1), stored=record(STEPS))
    kinds = ["version 2 was altered", "version 4 is missing", "other bytes"]
    assert [any(kind in problem for problem in result.problems) for kind in kinds] == [True] * 3
    assert "version 2" in result.problems[0]


@settings(deadline=None)
@given(seed=st.integers(0, 10**9))
def test_no_byte_of_an_entry_can_change_unnoticed(seed: int) -> None:
    """One character of one entry's text is replaced: it no longer reads, or the audit finds it."""
    dice = random.Random(seed)
    entries = clean()
    index = dice.randrange(STEPS)
    text = entries[index].to_json()
    at = dice.randrange(len(text))
    other = text[:at] + dice.choice('0123456789abcdefxyz"{}[]:,. ') + text[at + 1 :]
    try:
        entries[index] = LedgerEntry.from_json(other)
    except RecordDamaged:
        return
    if asdict(entries[index]) != asdict(clean()[index]):
        assert not found(entries).ok
