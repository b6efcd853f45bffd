"""What a complete step comes to: its slots' average, the optimizer's step, and the entry that says so.

A training server and the participants of a round do this alike; whoever is first commits it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchord.cache.errors import NonFinite
from torchord.cache.ledger.records import PARTIAL_SUMS, LedgerEntry, SlotReceipt, SlotRecord, StateRecord
from torchord.cache.ledger.step_metrics import METRICS
from torchord.coordinator.compute.shares import mean_loss, total_weight
from torchord.coordinator.compute.step_metrics import combined
from torchord.coordinator.compute.sums import Aggregate
from torchord.coordinator.compute.trainer import ApplyReport, Trainer
from torchord.coordinator.runtime.context import RunContext


def receipts_of(roots: Sequence[SlotRecord]) -> tuple[list[SlotReceipt], list[list[Any]]]:
    """(what the ledger keeps of each shard, what it notes of each partial sum), each in order."""
    shards: list[SlotReceipt] = []
    sums: list[SlotReceipt] = []
    for root in roots:
        if root.total is None:
            shards.append(root.receipt())
        else:
            shards += root.total.receipts
            sums += [*root.total.sums, root.receipt()]
    sums.sort(key=lambda receipt: receipt.shard)
    return shards, [[each.shard, each.digest, each.worker, each.attempt] for each in sums]


def _shards(roots: Sequence[SlotRecord]) -> list[SlotRecord | SlotReceipt]:
    return [part for root in roots for part in (root.total.receipts if root.total else (root,))]


def loss_of(roots: Sequence[SlotRecord]) -> float:
    """The weighted mean loss of a step, summed in shard order; NaN if its shards weigh nothing together."""
    return mean_loss((shard.loss, shard.examples, shard.weight) for shard in _shards(roots))


def metrics_of(roots: Sequence[SlotRecord]) -> dict[str, float]:
    """What a step measured beside its loss, put together in shard order."""
    return combined([(shard.metrics, shard.examples, shard.weight) for shard in _shards(roots)])


def nonfinite(roots: Sequence[SlotRecord]) -> list[int]:
    """The shards whose loss or gradient was NaN or infinite."""
    found: list[int] = []
    for root in roots:
        if root.total is not None:
            found += root.total.nonfinite
        elif not (math.isfinite(root.loss) and math.isfinite(root.grad_norm)):
            found.append(root.shard)
    return found


@dataclass(frozen=True, slots=True)
class Updated:
    """What an update did.

    Attributes:
        report: figures of the optimizer's step.
        loss: mean loss of the step.
    """

    report: ApplyReport
    loss: float


def update(
    run: str,
    trainer: Trainer,
    step: int,
    roots: Sequence[SlotRecord],
    mean: Aggregate,
    *,
    epoch_ends: bool,
) -> Updated:
    """Step the optimizer by a step's average.

    Args:
        roots: the slots that the average is of, in slot order.
        mean: their average; changed in place.
        epoch_ends: whether the step is its epoch's last.

    Raises:
        NonFinite: the gradients are not finite and the config asks to stop then; says in which shards.
    """
    loss, bad = loss_of(roots), nonfinite(roots)
    try:
        report = trainer.apply(
            mean.gradients, mean.buffers, step=step, loss=loss, finite=not bad, epoch_ends=epoch_ends
        )
    except NonFinite as error:
        where = f"arose in shards {bad}" if bad else "arose in the average only"
        if not bad and total_weight((slot.examples, slot.weight) for slot in roots) == 0:
            where = "is a mean of nothing: all shards weigh 0, as no label of the whole batch counts"
        raise NonFinite(f"run {run!r}: {error} (the NaN or infinity {where})") from error
    return Updated(report, loss)


def entry_of(
    context: RunContext,
    step: int,
    roots: Sequence[SlotRecord],
    updated: Updated,
    *,
    parameters: str,
    previous: str,
    committed_at: float,
    token: int,
    server: str,
    notes: Mapping[str, Any],
) -> LedgerEntry:
    """What the ledger is to say of a step, chain and seal included.

    Args:
        parameters: digest of the new version's parameters.
        previous: chain of the version before.
        committed_at: Unix time (s) of the commit before.
        token: fencing token under which the step is committed.
        server: id of the worker that made the version.
        notes: what is to be noted beside what follows from the plan.
    """
    plan, now = context.plan(), time.time()
    receipts, sums = receipts_of(roots)
    return LedgerEntry(
        version=step + 1,
        slots=tuple(receipts),
        parameters=parameters,
        loss=updated.loss,
        grad_norm=updated.report.grad_norm,
        examples=sum(slot.examples for slot in roots),
        seconds=max(0.0, now - committed_at),
        committed_at=now,
        token=token,
        server=server,
        skipped=updated.report.skipped,
        lr=tuple(updated.report.lr),
        previous=previous,
        notes={
            **_origin(context.spec, step),
            **({"switch": plan.switches[step]} if step in plan.switches else {}),
            **({PARTIAL_SUMS: sums} if plan.fan_in(step).partials else {}),
            **({METRICS: metrics} if (metrics := metrics_of(roots)) else {}),
            **notes,
        },
    ).sealed()


def kept_states(
    context: RunContext,
    step: int,
    slots: Iterable[SlotRecord],
    before: Mapping[int, StateRecord],
    *,
    skipped: bool,
) -> tuple[dict[int, StateRecord], list[StateRecord]]:
    """(what the slots keep after a step, states that they have made and nobody will need).

    Args:
        slots: of the step's shards; one that sits the step out keeps what it kept.
        before: what they kept at the version that the step starts from.
        skipped: whether the update was left out for a NaN: that changes no slot's state.
    """
    if not context.keeps_state(step):
        return {}, []
    made = {slot.shard: slot.state for slot in slots if slot.state is not None}
    return ({**before}, list(made.values())) if skipped else ({**before, **made}, [])


def event_of(entry: LedgerEntry) -> dict[str, Any]:
    """The event of a committed step."""
    return {
        "step": entry.version - 1,
        "version": entry.version,
        "loss": entry.loss,
        "grad_norm": entry.grad_norm,
        "examples": entry.examples,
        "seconds": entry.seconds,
        "nbytes": sum(slot.nbytes for slot in entry.slots),
        "lr": list(entry.lr),
        "skipped": entry.skipped,
        "fetched": dict(Counter(slot.fetched for slot in entry.slots)),
        **({METRICS: entry.metrics} if entry.metrics else {}),
    }


def _origin(spec: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Where the weights of the run's first version came from, if they are not the recipe's own."""
    fork = spec.get("fork")
    if fork is not None and step == fork["version"]:
        return {"fork": {name: fork[name] for name in ("run", "version", "chain")}}
    start = spec.get("start_from") if step == 0 else None
    return {} if start is None else {"start_from": {"source": start["source"], "digest": start["digest"]}}
