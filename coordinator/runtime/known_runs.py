"""What is known of runs: by their ledgers, and by what lies on disk where Redis has forgotten them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from torchord.cache.errors import CheckpointError, TorchordError
from torchord.cache.files.run_store import RunRecord, RunStore
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import Head

log = logging.getLogger(__name__)

ON_DISK = "on disk"


def record_of(ledger: Ledger, head: Head, evaluations: Mapping[int, Mapping[str, float]]) -> RunRecord:
    """What a run's ledger says of it.

    Args:
        evaluations: of the run, as the ledger has them.

    Raises:
        TorchordError: it cannot be read.
    """
    last = next(iter(ledger.entries(head.version, head.version)), None) if head.version else None
    measured = {} if last is None else last.metrics
    return RunRecord(
        name=ledger.run,
        incarnation=head.incarnation,
        state=head.status,
        version=head.version,
        total_steps=head.total_steps,
        submitted_at=head.submitted_at,
        changed_at=head.committed_at,
        loss=None if last is None else last.loss,
        error=str((head.error or {}).get("message", "")) if head.status == "failed" else "",
        notes=head.notes,
        tags=head.tags,
        metrics={**measured, **(evaluations[max(evaluations)] if evaluations else {})},
    )


def rebuild(store: RunStore, checkpoint_dir: str, known: Iterable[str] = ()) -> None:
    """Fill a store that was lost from the checkpoints; what cannot be read there is left out.

    Args:
        known: runs that Redis knows: their ledgers say more.
    """
    from torchord.cache.files.checkpoint import CheckpointStore, runs_in  # loads torch

    found, there = [], set(known)
    for name in runs_in(checkpoint_dir):
        if name in there:
            continue
        try:
            spec = CheckpointStore(checkpoint_dir, name).load_spec()
            if spec is None:
                continue
            incarnation = str(spec.get("incarnation", ""))
            checkpoints = CheckpointStore(checkpoint_dir, name, incarnation)
            versions = checkpoints.versions()
            meta = checkpoints.meta(versions[-1]) if versions else {}
            found.append(_of_checkpoint(name, incarnation, versions[-1] if versions else 0, meta))
        except (TorchordError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("what lies of run %.100r beside its checkpoints is left out: %s", name, error)
    if found:
        store.put(found)


def _of_checkpoint(name: str, incarnation: str, version: int, meta: dict[str, object]) -> RunRecord:
    said = meta.get("run_record") or {}
    evaluations = meta.get("evaluations") or {}
    if not isinstance(said, dict) or not isinstance(evaluations, dict):
        raise CheckpointError("its marker says what is none")
    total = said.get("total_steps")
    newest = evaluations[max(evaluations, key=int)] if evaluations else {}
    return RunRecord(
        name=name,
        incarnation=incarnation,
        state="done" if total is not None and version >= int(total) else ON_DISK,
        version=version,
        total_steps=None if total is None else int(total),
        submitted_at=float(said.get("submitted_at", 0.0)),
        changed_at=float(said.get("committed_at", 0.0)),
        notes=str(said.get("notes", "")),
        tags=tuple(map(str, said.get("tags", ()))),
        metrics={str(metric): float(value) for metric, value in dict(newest).items()},
    )
