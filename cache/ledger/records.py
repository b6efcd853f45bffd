"""What the control plane stores, as frozen values with a JSON form.

A record holds references and small numbers, never tensors.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.errors import RecordDamaged
from torchord.cache.ledger import fields as known
from torchord.cache.ledger.delta_record import DeltaRecord
from torchord.cache.ledger.figures import figures_in, to_text
from torchord.cache.ledger.peoples_fields import fields_of
from torchord.cache.ledger.rest_record import RestRecord
from torchord.cache.ledger.step_metrics import METRICS, Row
from torchord.cache.reading import number_of

GENESIS = "0" * 32

PARTIAL_SUMS = "partial_sums"
"""In the notes of a ledger entry: [number, digest, worker, attempt] of each partial sum, in order."""

CHECKS = "checks"
"""In the notes of a ledger entry: [shard, worker that computed it again, compared] of each check."""

CONTENT = "content"  # in the notes of a ledger entry: digests of the version's blobs

LIED = "lied "  # how claims begin: a gradient of the node that follows was a lie
UNLIKE = "unlike "  # likewise: why a worker, whose id follows, is not like the run's first Client
FALSIFIED = "falsified "  # likewise: why it takes part in no round of the run


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class SlotReceipt:
    """What the ledger keeps of a slot after its bytes are gone; its fields are those of `SlotRecord`."""

    shard: int
    digest: str
    examples: int
    loss: float
    worker: str
    attempt: int
    seconds: float
    nbytes: int
    environment: str = ""
    fetched: str = "process"
    weight: float | None = None
    metrics: dict[str, Row] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-able form (`dataclasses.asdict` costs ten times as much, and there may be hundreds)."""
        # So entries of before keep their seals.
        left_out = tuple(name for name in ("weight", "metrics") if getattr(self, name) is None)
        return {name: getattr(self, name) for name in self.__slots__ if name not in left_out}

    def essence(self) -> list[Any]:
        """What of it a replay must meet again."""
        return [self.shard, self.digest, self.examples, *([] if self.weight is None else [self.weight])]


@dataclass(frozen=True, slots=True)
class SumRecord:
    """What belongs to a partial sum beside its tensors.

    Attributes:
        receipts: of the shards in it, in slot order.
        sums: of the partial sums that it was made from, in slot order; its own is not among them.
        nonfinite: the shards whose loss or gradient was NaN or infinite.
        notes: what its tensors stand for (torchord.coordinator.compute.sums).
    """

    receipts: tuple[SlotReceipt, ...]
    sums: tuple[SlotReceipt, ...] = ()
    nonfinite: tuple[int, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-able form."""
        return {
            "receipts": [receipt.as_dict() for receipt in self.receipts],
            "sums": [receipt.as_dict() for receipt in self.sums],
            "nonfinite": list(self.nonfinite),
            "notes": self.notes,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SumRecord:
        """The inverse of `as_dict`."""
        receipts, sums = (
            tuple(SlotReceipt(**known.RECEIPT.of(each)) for each in known.SUM.of(fields)[name])
            for name in ("receipts", "sums")
        )
        return cls(receipts, sums, tuple(fields["nonfinite"]), fields["notes"])


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """One written slot: a shard's gradient, or a partial sum.

    Attributes:
        shard: number of the shard in its global step; partial sums are numbered on from the last shard.
        digest: checksum of the stored bytes (gradients, then changed buffers).
        nonce: which attempt wrote it; names its chunks.
        blob: where the bytes are.
        manifest: layout of the bytes (torchord.cache.tensors.codec.Manifest as JSON).
        buffers: names in the manifest that are buffers, not gradients.
        examples: how many examples the shard held.
        loss: mean loss over the shard; 0 where it weighs nothing.
        grad_norm: L2 norm of the shard's gradient.
        worker: id of the worker process that computed it.
        attempt: 1 for the first try of this shard.
        seconds: compute time of the shard.
        environment: what could change bits: torch version, device, threads, CPU capability.
        compression: how the gradients are encoded (`TrainingConfig.compression`).
        state: what the slot keeps for its next step, None if nothing.
        fetched: which tier the worker had the parameters from: "process", "delta" (added to the version
            that it held), "host" or "store".
        total: of a partial sum, what it sums up; None for a gradient.
        weight: what the loss is a mean over, for a partial sum all its shards' together; None: the examples.
        metrics: what the shard measured beside its loss; None: nothing, or it is a partial sum.
    """

    shard: int
    digest: str
    nonce: str
    blob: BlobRef
    manifest: dict[str, Any]
    buffers: tuple[str, ...]
    examples: int
    loss: float
    grad_norm: float
    worker: str
    attempt: int
    seconds: float
    environment: str = ""
    compression: str = "none"
    state: StateRecord | None = None
    fetched: str = "process"
    total: SumRecord | None = None
    weight: float | None = None
    metrics: dict[str, Row] | None = None

    def to_json(self) -> str:
        """Text for the slots hash."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        if self.metrics is None:
            del fields["metrics"]
        fields["blob"] = self.blob.to_json()
        fields["buffers"] = list(self.buffers)
        fields["state"] = None if self.state is None else self.state.as_dict()
        fields["total"] = None if self.total is None else self.total.as_dict()
        return to_text(fields)

    @classmethod
    def from_json(cls, text: str) -> SlotRecord:
        """The inverse of `to_json`; raises RecordDamaged or InvalidInput, which name the field."""
        fields = known.SLOT.read(text, figures_in(text))
        fields["blob"] = BlobRef.from_json(fields["blob"])
        fields["buffers"] = tuple(fields["buffers"])
        fields["state"] = StateRecord.from_dict(fields["state"]) if fields.get("state") else None
        fields["total"] = SumRecord.from_dict(fields["total"]) if fields.get("total") else None
        return cls(**fields)

    def receipt(self) -> SlotReceipt:
        """What the ledger keeps of it."""
        return SlotReceipt(
            shard=self.shard,
            digest=self.digest,
            examples=self.examples,
            loss=self.loss,
            worker=self.worker,
            attempt=self.attempt,
            seconds=self.seconds,
            nbytes=self.blob.nbytes,
            environment=self.environment,
            fetched=self.fetched,
            weight=self.weight,
            metrics=self.metrics,
        )

    def blobs(self) -> list[BlobRef]:
        """All bytes that the slot points to."""
        return [self.blob] if self.state is None else [self.blob, *self.state.blobs()]


@dataclass(frozen=True, slots=True)
class StateRecord:
    """A stored tree (of the optimizer's state, or of a slot's): its skeleton and its tensors."""

    skeleton: Any
    manifest: dict[str, Any]
    blob: BlobRef | None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-able form."""
        blob = None if self.blob is None else self.blob.to_json()
        return {"skeleton": self.skeleton, "manifest": self.manifest, "blob": blob}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> StateRecord:
        """The inverse of `as_dict`."""
        blob = known.STATE.of(fields)["blob"]
        return cls(fields["skeleton"], fields["manifest"], None if blob is None else BlobRef.from_json(blob))

    def blobs(self) -> list[BlobRef]:
        """The bytes that the tree's tensors are in."""
        return [] if self.blob is None else [self.blob]


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """Where the parameters of one version are, and what else belongs to it.

    Attributes:
        version: its number.
        digest: of the parameters' bytes, in one buffer.
        blob: where they are; of a version with a `rest`, what moves.
        chain: ledger chain of the version.
        state: optimizer state, if it was published.
        slots: shard -> slot state after the step that made this version.
        delta: how it follows from the version before, if parameters are compressed.
        rest: what it shares with other versions; None where `blob` is the whole.
    """

    version: int
    digest: str
    blob: BlobRef
    chain: str
    state: StateRecord | None = None
    slots: dict[int, StateRecord] = field(default_factory=dict)
    delta: DeltaRecord | None = None
    rest: RestRecord | None = None

    def own_blobs(self) -> list[BlobRef]:
        """The bytes of the parameters that no other version has: as a version, and as a delta."""
        return [self.blob] if self.delta is None else [self.blob, self.delta.blob]

    def shared_blobs(self) -> list[BlobRef]:
        """The bytes of the parameters that other versions have, too."""
        return [] if self.rest is None else [self.rest.blob]

    def blobs(self) -> list[BlobRef]:
        """All bytes that the record points to; what rests and slot states may be other versions' too."""
        states = [*([] if self.state is None else [self.state]), *self.slots.values()]
        of_states = [blob for state in states for blob in state.blobs()]
        return [*self.own_blobs(), *self.shared_blobs(), *of_states]

    def to_json(self) -> str:
        """Text for the versions hash."""
        return json.dumps(
            {
                "version": self.version,
                "digest": self.digest,
                "blob": self.blob.to_json(),
                "chain": self.chain,
                "state": None if self.state is None else self.state.as_dict(),
                "slots": {str(shard): state.as_dict() for shard, state in self.slots.items()},
                **({} if self.delta is None else {"delta": self.delta.as_dict()}),
                **({} if self.rest is None else {"rest": self.rest.as_dict()}),
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> VersionRecord:
        """The inverse of `to_json`; errors as for `SlotRecord.from_json`."""
        fields = known.VERSION.read(text)
        state = fields["state"]
        return cls(
            version=fields["version"],
            digest=fields["digest"],
            blob=BlobRef.from_json(fields["blob"]),
            chain=fields["chain"],
            state=None if state is None else StateRecord.from_dict(state),
            slots={
                number_of(shard, "a slot"): StateRecord.from_dict(value)
                for shard, value in fields["slots"].items()
            },
            delta=DeltaRecord.from_dict(fields["delta"]) if "delta" in fields else None,
            rest=RestRecord.from_dict(fields["rest"]) if "rest" in fields else None,
        )


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One committed global step.

    `chain` covers what a replay must meet again (the slots' bytes, the resulting parameters and
    the entry before); `seal` covers every field of the entry, so that an altered one is found.

    Attributes:
        version: the version that the step made; it started from `version - 1`.
        slots: what each shard contributed, in slot order.
        parameters: digest of the version's parameter bytes.
        loss: weighted mean loss of the step.
        grad_norm: L2 norm of the averaged gradient before clipping.
        examples: examples in the step.
        seconds: from the previous commit to this one.
        committed_at: Unix time (s) by the server's clock.
        token: fencing token of the server that committed.
        server: its worker id.
        skipped: the update was left out because of a NaN or Inf.
        lr: learning rate of each parameter group that the update used.
        previous: chain of the entry before.
    """

    version: int
    slots: tuple[SlotReceipt, ...]
    parameters: str
    loss: float
    grad_norm: float
    examples: int
    seconds: float
    committed_at: float
    token: int
    server: str
    skipped: bool
    lr: tuple[float, ...]
    previous: str
    chain: str = ""
    seal: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """What the step measured beside its loss, by name."""
        found: dict[str, float] = self.notes.get(METRICS, {})
        return found

    def computed_chain(self) -> str:
        """The chain value that follows from the entry's own contents."""
        slots = [slot.essence() for slot in self.slots]
        essence = [self.previous, self.version, slots, self.parameters, self.skipped]
        return hashlib.blake2b(canonical(essence).encode(), digest_size=16).hexdigest()

    def computed_seal(self) -> str:
        """A checksum over every field but `seal`."""
        fields = self._plain()
        fields.pop("seal")
        return hashlib.blake2b(canonical(fields).encode(), digest_size=16).hexdigest()

    def sealed(self) -> LedgerEntry:
        """The entry with `chain` and `seal` filled in."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields["chain"] = self.computed_chain()
        fields["seal"] = LedgerEntry(**fields).computed_seal()
        return LedgerEntry(**fields)

    def to_json(self) -> str:
        """Text for the ledger hash and its segments on disk."""
        return to_text(self._plain())

    def _plain(self) -> dict[str, Any]:
        """The fields as JSON has them; `dataclasses.asdict` takes three times as long."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields["slots"] = [slot.as_dict() for slot in self.slots]
        return fields

    @classmethod
    def from_json(cls, text: str) -> LedgerEntry:
        """The inverse of `to_json`; errors as for `SlotRecord.from_json`."""
        fields = known.ENTRY.read(text, figures_in(text))
        fields["slots"] = tuple(SlotReceipt(**known.RECEIPT.of(slot)) for slot in fields["slots"])
        fields["lr"] = tuple(fields["lr"])
        known.NOTES.of(fields.get("notes", {}))
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Head:
    """The state of a run, as one read of its head gives it.

    Attributes:
        status: pending, running, paused, failed, cancelled or done.
        version: number of committed global steps.
        total_steps: global steps of the whole run; None before a server has seen the dataset.
        token: the fencing token in force.
        owner: worker id of the training server, "" if none.
        queue: private queue of the owner's worker.
        launched: the step whose chord was published, None if that is not recorded.
        reached: the highest step that was ever launched, -1 before the first; a rollback leaves it.
        environment: what of the first worker that computed could change bits, "" before that.
        server_environment: the same of the first training server.
        skew: "refuse" if a worker of another environment may not compute.
        backups: shards that were sent to another worker as well, because their holder was slow.
        shared: several processes of one node take turns as server.
        round: the last step of the round that is open, None if there is none.
        on: what is to be told of the run, to how many: ",done=1,failed=2,"; "" for nothing.
        weight, priority: its share of the fleet (scripts/ranked.lua); tags, notes: what people have written.
        error: why the run failed: {"message", "kind", ...}.
        stopped: the verdict that ends the run before its last step: {"version", "rule", "reason"}; None if
            there is none.
        started_at: Unix time (s) at which version 0 was made; 0 where that is not recorded.
    """

    status: str
    version: int
    total_steps: int | None
    dataset_size: int | None
    dataset_digest: str
    evaluation_size: int | None
    incarnation: str
    chain: str
    token: int
    owner: str
    node: str
    queue: str
    launched: int | None
    shared: bool
    submitted_at: float
    committed_at: float
    duplicates: int
    late: int
    divergent: int
    replayed: int
    error: dict[str, Any] | None
    reached: int = -1
    environment: str = ""
    server_environment: str = ""
    skew: str = ""
    backups: int = 0
    round: int | None = None
    stopped: dict[str, Any] | None = None
    started_at: float = 0.0
    on: str = ""
    weight: float = 1.0
    priority: int = 0
    tags: tuple[str, ...] = ()
    notes: str = ""

    @classmethod
    def from_hash(cls, fields: dict[str, str]) -> Head:
        """Read the head hash; raises RecordDamaged, which names the field."""
        if lacking := _HEAD_NEEDS - fields.keys():
            raise RecordDamaged(f"a run's head has no field {min(lacking)!r}")

        def integer(name: str) -> int | None:
            value = fields.get(name)
            return number_of(value, f"field {name!r} of a run's head") if value else None

        def seconds(name: str) -> float:
            try:
                return float(value := fields.get(name, "0"))
            except ValueError:
                raise RecordDamaged(f"field {name!r} of a run's head is {value:.60}, no time") from None

        return cls(
            status=fields["status"],
            version=integer("version") or 0,
            total_steps=integer("total_steps"),
            dataset_size=integer("dataset_size"),
            dataset_digest=fields.get("dataset_digest", ""),
            evaluation_size=integer("evaluation_size"),
            incarnation=fields["incarnation"],
            chain=fields["chain"],
            token=integer("token") or 0,
            owner=fields.get("owner", ""),
            node=fields.get("node", ""),
            queue=fields.get("queue", ""),
            launched=integer("launched"),
            shared=fields.get("shared") == "1",
            submitted_at=seconds("submitted_at"),
            committed_at=seconds("committed_at"),
            duplicates=integer("duplicates") or 0,
            late=integer("late") or 0,
            divergent=integer("divergent") or 0,
            replayed=integer("replayed") or 0,
            error=known.ERROR.read(text, figures_in(text)) if (text := fields.get("error")) else None,
            backups=integer("backups") or 0,
            reached=-1 if fields.get("reached", "-1") == "-1" else integer("reached") or 0,
            environment=fields.get("environment", ""),
            server_environment=fields.get("server_environment", ""),
            skew=fields.get("skew", ""),
            round=integer("round"),
            stopped=known.STOPPED.read(fields["stopped"]) if fields.get("stopped") else None,
            started_at=seconds("started_at"),
            on=fields.get("on", ""),
            **fields_of(fields),
        )


_HEAD_NEEDS = {"status", "version", "incarnation", "chain", "token", "submitted_at", "committed_at"}


def combined_digest(digest: str, state: StateRecord) -> str:
    """One digest over a slot's payload and the state that it keeps."""
    kept = "" if state.blob is None else state.blob.digest
    text = f"{digest} {kept} {canonical(state.skeleton)}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
