"""Who lies, where two computations of a shard differ, or a gradient cannot be right.

The training server computes such a shard itself, the third after the two workers, twice, each time in
copies of recipe, model and dataset of its own. Where these two are alike and so is one of the workers', the
other has lied: broken memory, another file, or intent. Its node is quarantined, what it wrote is thrown away,
and the step's shards are computed by others, to the bits of a run in which nothing happened. Where they are
not, the recipe is not pure, and the run stops.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchord.cache.errors import CacheError, RunFailed, SlotRefused
from torchord.cache.ledger.distrusted import Distrusted, node_of
from torchord.cache.ledger.heartbeat import Heartbeat
from torchord.cache.ledger.records import LIED, SlotRecord, combined_digest
from torchord.coordinator.compute import gradient
from torchord.coordinator.compute.shard import ShardWork, work
from torchord.coordinator.messages.task_names import GRADIENTS
from torchord.coordinator.runtime.context import RunContext
from torchord.coordinator.runtime.trust import checks
from torchord.coordinator.server.differences import first_difference, named, tensors_of
from torchord.coordinator.server.warm_run import WarmRun
from torchord.coordinator.spec.sum_tree import FanIn

log = logging.getLogger(__name__)


SAME = "the training server computes the same"
"""Why nobody is convicted of a gradient that looks wrong: it is the recipe's."""

_FAR = 100.0  # times the other shards' median: a gradient so long is computed once more


@dataclass(frozen=True)
class Third:
    """What the training server makes of a shard.

    Attributes:
        named: its tensors and whatever else it keeps, under names for people.
        done: the work.
    """

    named: dict[str, Any]
    done: ShardWork

    def differs(self, warm: WarmRun, slot: SlotRecord) -> str:
        """In what a slot differs from it, in words; "" if in nothing."""
        if what := wrong_digest(slot):
            return what
        if not (_finite(slot) or _finite(self.done)):
            return ""  # a NaN has many bits
        try:
            there = tensors_of(slot, warm.context.services.gradients)
        except CacheError as error:
            return f"its bytes cannot be read ({error})"
        if what := first_difference(there, self.named):
            return what
        figures = (
            ("loss", slot.loss, self.done.loss),
            ("gradient's norm", slot.grad_norm, self.done.grad_norm),
        )
        for name, one, other in figures:
            if one != other and not (math.isnan(one) and math.isnan(other)):
                return f"its {name} was given as {one!r} and is {other!r}"
        if (slot.examples, slot.weight) != (self.done.examples, self.done.weight):
            return (
                f"it was given {slot.examples} examples of weight {slot.weight!r} and has "
                f"{self.done.examples} of weight {self.done.weight!r}"
            )
        return ""


class Jury:
    """Decides who lied, for one training server.

    Args:
        heartbeat: of this process; knows whom nobody trusts.
    """

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat
        self._refused: Counter[tuple[str, int, int]] = Counter()
        self._vouched: dict[str, float] = {}  # run -> how far from the others' a gradient was, and right

    # --- what nobody trusts -----------------------------------------------------------------

    def discard(self, warm: WarmRun, present: Mapping[int, SlotRecord]) -> None:
        """Throw away what quarantined nodes wrote for the present step.

        Raises:
            SlotRefused: they wrote something.
        """
        barred = self.heartbeat.distrusted
        if not barred or not checks(warm.context):
            return
        found = [slot for slot in present.values() if not barred.keys().isdisjoint(_nodes(slot))]
        if found:
            self._open(warm, present, found)
            whose = ", ".join(sorted({node for slot in found for node in _nodes(slot)} & barred.keys()))
            raise SlotRefused(f"run {warm.run!r}: what {whose} wrote for step {warm.version} is not used")

    # --- who lied -------------------------------------------------------------------------

    def decide(self, warm: WarmRun, present: Mapping[int, SlotRecord], disputed: Iterable[SlotRecord]) -> str:
        """Compute a shard that slots differ in, and quarantine who lied.

        Args:
            present: the step's slots.
            disputed: two slots or one that hold the same shard, the shard's own first.

        Returns:
            Why nothing was decided, in words, "" if that needs none: then the recipe is at fault, or nobody
            can tell.

        Raises:
            SlotRefused: somebody lied, and is quarantined; the slots are open again.
        """
        slots = list(disputed)
        shard = warm.context.plan().fan_in(warm.version).shard_of(slots[0].shard)
        nodes = {node_of(slot.worker) for slot in slots}
        if len(slots) > 1 and len(nodes) == 1:
            return ""
        third = self.third(warm, shard, slots[0])
        if isinstance(third, str):
            return third
        found = [(slot, what) for slot in slots if (what := third.differs(warm, slot))]
        if len(slots) > 1 and len(found) == len(slots):
            return "and a third time, by the training server, it came out differently again"
        if not found:
            return SAME
        ((liar, what),) = found
        if not self._convict(warm, liar, shard, what):
            return "it was said of too many workers of this run to be their fault"
        theirs = [slot for slot in present.values() if node_of(liar.worker) in _nodes(slot)]
        self._open(warm, present, theirs)
        raise SlotRefused(self.heartbeat.distrusted[node_of(liar.worker)].said())

    def refuse(self, warm: WarmRun, present: Mapping[int, SlotRecord], slot: SlotRecord, what: str) -> None:
        """Refuse a slot that cannot be right, unless the training server computes the same.

        Args:
            what: is wrong with it, with the figure.

        Raises:
            SlotRefused: it is open again; its worker is quarantined if that could be decided.
            RunFailed: that happened too often to this shard, and nobody can tell why.
        """
        why = self.decide(warm, present, [slot])
        if why == SAME:
            return
        place = (warm.run, warm.version, slot.shard)
        self._refused[place] += 1
        told = (
            f"run {warm.run!r}: the gradient of shard {slot.shard} of step {warm.version} by worker "
            f"{slot.worker} is refused: {what}"
        )
        if self._refused[place] > max(warm.context.config.max_attempts, 3):
            raise RunFailed(f"{told}, {self._refused[place]} times in a row; {why}")
        self._open(warm, present, [slot])
        warm.ledger.emit("slot refused", {"worker": slot.worker, "message": told})
        raise SlotRefused(told)

    def look(self, warm: WarmRun, present: Mapping[int, SlotRecord], slots: Sequence[SlotRecord]) -> None:
        """Look at what the shards of a step say of themselves, before any of their bytes is used.

        Raises:
            SlotRefused: a number of examples, a weight or a length cannot be right.
        """
        if any(slot.total is not None for slot in slots):
            return
        sizes = warm.context.plan().shard_sizes(warm.version)
        for slot in slots:
            if slot.examples != sizes[slot.shard]:
                self.refuse(warm, present, slot, f"it says {slot.examples} examples of {sizes[slot.shard]}")
            if slot.weight is not None and not (math.isfinite(slot.weight) and slot.weight >= 0):
                self.refuse(warm, present, slot, f"it says that it weighs {slot.weight}")
        norms = sorted(slot.grad_norm for slot in slots)
        if len(norms) < 4 or not norms[len(norms) // 2] > 0 or not checks(warm.context):
            return
        far = norms[-1] / norms[len(norms) // 2]
        if math.isfinite(far) and far > max(_FAR, 10 * self._vouched.get(warm.run, 0.0)):
            self._vouched[warm.run] = far  # an honest run may have such shards, and is not to pay for each
            longest = next(slot for slot in slots if slot.grad_norm == norms[-1])
            said = f"its norm of {norms[-1]:.3g} is {far:.3g} times that of the step's other shards"
            if (why := self.decide(warm, present, [longest])) != SAME:
                log.warning(
                    "run %s: shard %d of step %d: %s; %s", warm.run, longest.shard, warm.version, said, why
                )

    def third(self, warm: WarmRun, shard: int, slot: SlotRecord) -> Third | str:
        """Compute a shard of the present step here, twice; why that cannot be done, in words, if it can't."""
        context = warm.context
        if not checks(context):
            return "the run has no checks"
        here, there = self.heartbeat.info.environment, slot.environment
        if context.config.compile or (here and there and here != there):
            return "the training server's machine is not like the worker's"
        try:
            first, second = self._computed(warm, shard)
        except CacheError:
            raise
        except Exception as error:  # it need not have the data
            log.warning("run %s: shard %d is not computed here", warm.run, shard, exc_info=True)
            return f"the training server could not compute it ({type(error).__name__}: {error})"
        compression = context.plan().config_at(warm.version).compression
        ours, again = (named(each.payload, each.buffers, each.state, compression) for each in (first, second))
        if what := first_difference(ours, again):
            return f"computed twice by the training server, {what}"
        return Third(ours, first)

    def _computed(self, warm: WarmRun, shard: int) -> Iterator[ShardWork]:
        """A shard of the present step twice, in copies of everything for each.

        Before the second, its samples go through these copies under another seed: what a recipe keeps from
        one visit to the next shows there, as in a worker that has seen them in an earlier epoch.
        """
        step = warm.version
        for visited in (False, True):
            fresh = RunContext(warm.context.services, warm.run, warm.context.incarnation)
            plan, version = fresh.plan(), fresh.plan().version_for(step)
            state = None
            if fresh.keeps_state(step):
                kept = fresh.services.parameters.record(warm.ledger, version).slots.get(shard)
                state = None if kept is None else fresh.services.gradients.get_state(kept)
            replica, _ = fresh.replica_at(version)
            recipe, dataset, config = fresh.recipe, fresh.dataset(), plan.config_at(step)
            if visited:
                samples = plan.parts(step, shard)[0]
                gradient.compute(replica, recipe, config, dataset, samples, plan.total_steps + step, shard)
            yield work(replica, recipe, plan, dataset, step, shard, state)

    def _convict(self, warm: WarmRun, liar: SlotRecord, shard: int, what: str) -> bool:
        """Quarantine a worker's node; False, and all of this run's are let go, where it is one too many.

        A recipe that is not pure in a way that a third computation does not show would else bar one node
        after the other, for all runs: so no run bars more than a minority of those who compute.
        """
        registry, node = self.heartbeat.registry, node_of(liar.worker)
        barred = {each.node for each in registry.distrusted().values() if each.run == warm.run} - {node}
        nodes = {info.node for info in registry.alive().values() if GRADIENTS in info.queues}
        if len(barred) >= max(1, (len(nodes) - 1) // 2):
            for each in barred:
                registry.readmit(each)
            self.heartbeat.distrusted = registry.distrusted()
            return False
        found = Distrusted.now(liar.worker, warm.run, warm.version, shard, what)
        registry.distrust(found)
        self.heartbeat.distrusted = {**self.heartbeat.distrusted, node: found}
        log.error("run %s: %s", warm.run, found.said())
        warm.ledger.claim(LIED + node, found.said())
        warm.ledger.emit("quarantined", {"worker": liar.worker, "node": node, "message": found.said()})
        return True

    def _open(self, warm: WarmRun, present: Mapping[int, SlotRecord], slots: Iterable[SlotRecord]) -> None:
        """Open slots of the present step again, with all sums that they are in."""
        tree, step, ledger = warm.context.plan().fan_in(warm.version), warm.version, warm.ledger
        wanted = {_root(tree, slot.shard) for slot in slots}
        for number in sorted(wanted):
            slot = present.get(number)
            if slot is None:  # of a sum that is in nobody's hands yet
                continue
            ledger.drop_slot(step, number, nonce=slot.nonce, token=warm.token, below=tree.below(number))
            warm.context.services.gradients.delete(slot.blobs())
            log.warning("run %s: slot %d of step %d is computed anew", warm.run, number, step)


def _finite(found: SlotRecord | ShardWork) -> bool:
    return math.isfinite(found.loss) and math.isfinite(found.grad_norm)


def wrong_digest(slot: SlotRecord) -> str:
    """What is wrong with a slot's digest, in words; "" if it is that of the bytes that it points to."""
    own = slot.blob.digest if slot.state is None else combined_digest(slot.blob.digest, slot.state)
    return "" if slot.digest == own else "its digest is not that of its bytes"


def _nodes(slot: SlotRecord) -> set[str]:
    """The nodes that had a hand in a slot."""
    workers = [slot.worker]
    if slot.total is not None:
        workers += [each.worker for each in (*slot.total.receipts, *slot.total.sums)]
    return set(map(node_of, workers))


def _root(tree: FanIn, number: int) -> int:
    """The slot that the training server reads, in which a slot is."""
    while (parent := tree.parent(number)) is not None:
        number = parent
    return number
