"""What the writer of a slot deletes and sends, for each answer of the ledger."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.control import blob, slot
from torchord.cache.blobs.blob import BlobRef
from torchord.cache.errors import CacheUnreachable
from torchord.cache.ledger.answers import Finished, Group
from torchord.cache.ledger.records import SlotRecord, StateRecord
from torchord.coordinator.client.slot_lease import SlotTask
from torchord.coordinator.client.slot_writer import SlotWriter
from torchord.coordinator.messages.task_names import UPDATES
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan

# Three steps of four shards; the slots 4 and 5 sum two each. A step is computed at the version before.
PLAN = Plan(24, TrainingConfig(batch_size=8, shards=4, fan_in=2, staleness=1, audit_fraction=0))
STEP, VERSION, SLOTS = 1, 0, 6
KEPT = StateRecord({}, {}, blob("kept", "kept"))
JOIN = ("group", {"task": "apply_update"})
OWN = "updates.celery@s0"


@dataclass
class Bench:
    """A writer whose ledger answers what it is told to, with notes of what it then does."""

    answer: Finished
    queue: str = OWN
    away: bool = False
    deleted: list[str] = field(default_factory=list)
    sent: list[tuple[Any, ...]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)

    # what the ledger is asked for

    def finish_slot(self, step: int, record: SlotRecord, **arguments: Any) -> Finished:
        self.asked.append({"step": step, "slot": record.shard, **arguments})
        return self.answer

    def head(self) -> Any:
        return SimpleNamespace(queue=self.queue)

    # what the store and the sender are asked for

    def delete(self, blobs: Iterable[BlobRef]) -> None:
        self.deleted += [each.key for each in blobs]

    def partial_sum(self, run: str, step: int, number: int, *, version: int, join: Any) -> None:
        self.sent.append(("sum", run, step, number, version, join))

    def advance(self, run: str, *, queue: str) -> None:
        self.sent.append(("advance", run, queue))

    def gradient(self, run: str, step: int, shard: int, *, version: int, backup: bool) -> None:
        if self.away:
            raise CacheUnreachable("away")
        self.sent.append(("backup" if backup else "gradient", run, step, shard, version))

    def write(self, shard: int = 1, *, join: Any = None, **more: Any) -> str:
        services: Any = SimpleNamespace(gradients=self)
        context: Any = SimpleNamespace(run="a-run", plan=lambda: PLAN, ledger=self)
        task = SlotTask("a-run", STEP, shard, VERSION, delivery="d", join=join)
        writer = SlotWriter(services, cast(Any, self), lambda point: None)
        record = slot(STEP, shard, state=KEPT)
        verdict, answer = writer.write(context, task, record, incarnation="life", **more)
        assert answer == self.answer.answer
        return verdict


def bench(verdict: Any = "written", present: int = 3, *, called: bool = False, **more: Any) -> Bench:
    return Bench(Finished(verdict, present, called, **more))


@pytest.mark.parametrize("verdict", ["duplicate", "divergent", "late", "early", "stopped"])
def test_of_a_slot_that_is_refused_all_bytes_go_and_nothing_is_sent(verdict: Any) -> None:
    """They are its own: another attempt's have another key. It is not the last of the step."""
    one = bench(verdict, present=SLOTS, called=True)
    assert one.write(join=JOIN) == verdict
    assert one.deleted == [f"gradient:{STEP}:1:n", "kept"]
    assert one.sent == []


def test_of_an_input_whose_sum_is_made_the_gradient_goes_and_what_the_slot_keeps_stays() -> None:
    one = bench("spare")
    assert one.write() == "written"
    assert one.deleted == [f"gradient:{STEP}:1:n"]
    assert one.sent == []


def test_the_last_input_of_a_sum_sends_the_sum_with_the_chord_that_it_is_a_part_of() -> None:
    one = bench("group")
    assert one.write(3, join=JOIN) == "written"
    assert one.sent == [("sum", "a-run", STEP, 5, VERSION, JOIN)]
    assert one.deleted == []
    assert one.asked[0]["into"] == Group(5, 2, 3)


def test_a_root_goes_into_no_sum() -> None:
    one = bench("written")
    assert one.write(5) == "written"
    assert one.asked[0]["into"] is None and one.deleted == [] and one.sent == []


@pytest.mark.parametrize(
    ("present", "join", "called", "expected"),
    [
        (SLOTS, JOIN, False, False),
        (SLOTS, JOIN, True, True),
        (SLOTS, None, False, True),
        (SLOTS - 1, None, True, False),
    ],
    ids=["its chord calls", "its chord has called before", "sent again, in no chord", "others are missing"],
)
def test_the_last_slot_of_a_step_calls_the_server_where_no_chord_does(
    present: int, join: Any, called: bool, expected: bool
) -> None:
    one = bench("written", present, called=called)
    assert one.write(4, join=join) == "written"
    assert one.sent == ([("advance", "a-run", OWN)] if expected else [])


def test_a_run_that_nobody_serves_is_called_for_where_any_server_hears_it() -> None:
    one = bench("written", SLOTS)
    one.queue = ""
    one.write(4)
    assert one.sent == [("advance", "a-run", UPDATES)]


@pytest.mark.parametrize("verdict", ["written", "late"])
def test_a_shard_that_is_late_gets_a_backup(verdict: Any) -> None:
    one = bench(verdict, late=2)
    one.write()
    assert one.sent == [("backup", "a-run", STEP, 2, VERSION)]


def test_a_backup_that_cannot_be_sent_stops_nobody() -> None:
    one = replace(bench(late=2), away=True)
    assert one.write() == "written"


def test_the_ledger_is_told_what_the_slot_was_computed_for() -> None:
    """And only who has written a shard asks what is late: of a sum it is not known how long a shard takes."""
    one = bench(answer="counted")
    command = object()
    one.write(1, then=lambda: command)
    one.write(4)
    told = {"step": STEP, "incarnation": "life", "version": VERSION}
    assert one.asked == [
        {**told, "slot": 1, "into": Group(4, 0, 1), "then": command, "idle": (4, 0.01)},
        {**told, "slot": 4, "into": None, "then": None, "idle": None},
    ]
