"""Which fields the control plane's records have, and of which kinds."""

from __future__ import annotations

from torchord.cache.ledger import step_metrics
from torchord.cache.reading import (
    ANY,
    COUNT,
    COUNTS,
    FIGURE,
    FIGURES,
    FINITE,
    FLAG,
    LIST,
    NAMED_FIGURES,
    NAMED_TEXTS,
    OBJECT,
    ROWS,
    TEXT,
    TEXTS,
    Fields,
)

_RECEIPT = {
    "shard": COUNT,
    "digest": TEXT,
    "examples": COUNT,
    "loss": FIGURE,
    "worker": TEXT,
    "attempt": COUNT,
    "seconds": FIGURE,
}
_RECEIPT_MORE = {
    "environment": TEXT,
    "fetched": TEXT,
    "weight": FIGURE.or_none(),
    step_metrics.METRICS: step_metrics.ROWS_OF_METRICS.or_none(),
}

RECEIPT = Fields("the receipt of a slot", {**_RECEIPT, "nbytes": COUNT}, _RECEIPT_MORE)

SUM = Fields("a partial sum", {"receipts": LIST, "sums": LIST, "nonfinite": COUNTS, "notes": OBJECT})

SLOT = Fields(
    "a slot",
    {**_RECEIPT, "nonce": TEXT, "blob": OBJECT, "manifest": OBJECT, "buffers": TEXTS, "grad_norm": FIGURE},
    {**_RECEIPT_MORE, "compression": TEXT, "state": OBJECT.or_none(), "total": OBJECT.or_none()},
)

STATE = Fields("a stored tree", {"skeleton": ANY, "manifest": OBJECT, "blob": OBJECT.or_none()})

DELTA = Fields(
    "the difference of two versions",
    {"base": TEXT, "compression": TEXT, "manifest": OBJECT, "buffers": TEXTS, "blob": OBJECT},
)

REST = Fields("what versions share", {"blob": OBJECT, "tensors": TEXT})

VERSION = Fields(
    "the record of a version",
    {
        "version": COUNT,
        "digest": TEXT,
        "blob": OBJECT,
        "chain": TEXT,
        "state": OBJECT.or_none(),
        "slots": OBJECT,
    },
    {"delta": OBJECT, "rest": OBJECT},
)

NOTES = Fields(
    "the notes of a ledger entry",
    {},
    {
        "partial_sums": ROWS,
        "checks": ROWS,
        "start_from": OBJECT,
        "fork": OBJECT,
        step_metrics.METRICS: step_metrics.NAMED,
    },
    open=True,
)

ENTRY = Fields(
    "a ledger entry",
    {
        "version": COUNT,
        "slots": LIST,
        "parameters": TEXT,
        "loss": FIGURE,
        "grad_norm": FIGURE,
        "examples": COUNT,
        "seconds": FIGURE,
        "committed_at": FINITE,
        "token": COUNT,
        "server": TEXT,
        "skipped": FLAG,
        "lr": FIGURES,
        "previous": TEXT,
    },
    {"chain": TEXT, "seal": TEXT, "notes": OBJECT},
)

LEASE = Fields(
    "a lease",
    {"worker": TEXT, "attempt": COUNT, "open": FLAG},
    {"delivery": TEXT, "since": FINITE, "backups": COUNT, "asked": FINITE},
)

SWITCH = Fields("a switch", {}, open=True)

MANIFEST = Fields("the layout of the parameters", {}, open=True)

SPEC = Fields(
    "a run's spec",
    {"recipe": OBJECT, "config": OBJECT},
    {
        "switches": OBJECT,
        "fingerprint": TEXT,
        "skew": TEXT,
        "evaluation_seed": TEXT,
        "admitted": LIST,
        "fork": OBJECT,
    },
    open=True,
)

PART = Fields(
    "a part of an evaluation",
    {},
    {"examples": COUNT, "metrics": NAMED_FIGURES, "weights": NAMED_FIGURES, "states": OBJECT},
    open=True,
)

METRICS = Fields("an evaluation", {"metrics": NAMED_FIGURES})

OUTPUT = Fields(
    "the answer to a part of a prediction", {}, {"error": TEXT, "blob": OBJECT.or_none()}, open=True
)

FIRST = Fields(
    "what the first Client said of the run's first shard",
    {"worker": TEXT, "place": TEXT, "environment": TEXT, "seconds": FIGURE, "found": OBJECT},
    open=True,
)

KERNELS = Fields(
    "what the first worker said of its kernels",
    {"worker": TEXT, "environment": TEXT, "digests": NAMED_TEXTS},
    open=True,
)

DIGESTS = Fields(
    "the digests of a first shard",
    {"weights": NAMED_TEXTS, "batch": NAMED_TEXTS, "gradient": NAMED_TEXTS},
)

ENTRY_TOLD = Fields("an entry of the outbox", {"event": TEXT, "at": FINITE, "data": OBJECT})

TELLING = Fields(
    "how a delivery stands", {}, {"tries": COUNT, "due": FINITE, "error": TEXT, "dead": FLAG}, open=True
)

EVENT = Fields("an event", {"type": TEXT, "data": TEXT}, open=True)

EVENT_DATA = Fields("what an event says", {}, open=True)

STOPPED = Fields("why a run stopped", {"version": COUNT, "rule": TEXT, "reason": TEXT})

ERROR = Fields("why a run failed", {}, {"message": TEXT, "kind": TEXT, "traceback": TEXT}, open=True)
