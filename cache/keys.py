"""Every Redis key that torchord writes: its type, owner and life.

The braces around the run's name are a Redis Cluster hash tag: all control keys of one run
lie on one node, so a Lua script may touch several of them.

| key | type | written by | life |
| --- | --- | --- | --- |
| torchord:runs | zset name -> submit time (s) | Master | RUN_TTL after the last submit or commit |
| torchord:active | set of names that are not at rest | Master, server | RUN_TTL after the last change or commit |
| torchord:workers | zset worker id -> last beat (ms) | workers | WORKER_INDEX_TTL after the last beat |
| torchord:worker:ID | string, JSON of WorkerInfo | that worker | WORKER_LEASE, renewed by a thread |
| torchord:quarantine | list of queue entries that were no messages, their first 4 KiB | workers | QUARANTINE_TTL after the last, 100 at most |
| torchord:quarantined | string, how many such entries there were | workers | QUARANTINE_TTL after the last |
| torchord:distrusted | hash node -> JSON of Distrusted | server | DISTRUST_TTL after the last |
| torchord:placement | string, where chunks lie, in words | workers | WORKER_LEASE, renewed by a thread |
| torchord:turns | zset flow -> time at which its next message begins, see ranked.lua | enqueue.lua, commit.lua | WORK_TTL after the last message |
| torchord:supervisor | string, worker id | supervisor | SUPERVISOR_LEASE, renewed |
| torchord:telling | set of names of the runs that have something to tell | scripts only | RUN_TTL after the last entry |
| torchord:{RUN}:spec | string, JSON of recipe and config | Master | RUN_TTL, renewed at commit |
| torchord:{RUN}:head | hash, see cache/scripts | scripts only | RUN_TTL, renewed at commit |
| torchord:{RUN}:manifest | string, JSON of the parameter layout, sizes of given batches | server | RUN_TTL, renewed at commit |
| torchord:{RUN}:versions | hash version -> JSON of VersionRecord | server | RUN_TTL; fields leave with retention |
| torchord:{RUN}:pins | hash version -> expiry (ms) | readers of old versions | RUN_TTL; fields expire |
| torchord:{RUN}:ledger | hash version -> JSON of the step's entry | commit.lua | RUN_TTL; old fields spill to disk |
| torchord:{RUN}:expected | hash version -> chain to be met by a replay | rollback.lua | RUN_TTL; fields leave when met |
| torchord:{RUN}:claims | hash what -> text, JSON or a sentence | claim.lua | RUN_TTL after the last claim |
| torchord:{RUN}:events | stream, capped | scripts | RUN_TTL, renewed at commit |
| torchord:{RUN}:evaluations | hash version -> JSON of metrics | evaluate | RUN_TTL, renewed at commit |
| torchord:{RUN}:evaluating | hash version -> parts of a launched evaluation | server | RUN_TTL; fields leave when recorded |
| torchord:{RUN}:outbox | hash id -> JSON of what is to be told | scripts only | RUN_TTL; fields leave when told |
| torchord:{RUN}:telling | hash id -> JSON of how its delivery stands | scripts only | RUN_TTL; fields leave when told |
| torchord:{RUN}:heard | hash callback -> id of the last event that it was told | server | RUN_TTL after the last |
| torchord:{RUN}:slots:STEP | hash shard -> JSON of SlotRecord | write_slot.lua | WORK_TTL; deleted at commit |
| torchord:{RUN}:leases:STEP | hash shard -> JSON of holder | begin_shard.lua | WORK_TTL; deleted at commit |
| torchord:{RUN}:round | hash: token, steps, participants, see take_turn.lua | scripts only | RUN_TTL; deleted when it is closed |
| torchord:{RUN}:wake:ID | list that wakes a participant | scripts only | WAKE_TTL |
| torchord:{RUN}:underway | hash what -> JSON of Notice | announce.lua | UNDERWAY_TTL after the last notice |
| torchord:{RUN}:parts:VERSION | hash part -> JSON of partial metrics | evaluate | WORK_TTL; deleted when complete |
| torchord:{RUN}:predict:ID | hash part -> JSON of an output | predict | PREDICT_TTL; deleted by the caller |
| torchord:datasets | zset dataset name -> time of its put (s) | put_dataset.lua | the longest TTL of a dataset |
| torchord:dataset:NAME | hash: digest, JSON of Record | put_dataset.lua | DATASET_TTL or the put's, renewed on use |
| torchord:dataset:NAME:renewed | string, worker's mark | readers | at most RENEWAL_SECONDS |
| torchord:chunk:ADDRESS:0 | string, raw bytes of a dataset chunk | content store | as its dataset; GRACE_TTL once let go |
| torchord:blob:RUN:KIND:...:CHUNK | string, raw bytes | chunk store | BLOB_TTL, WORK_TTL (gradients, metrics) or PREDICT_TTL; deleted by retention |

Celery's own keys (queues, `unacked`, `celery-task-meta-*`, `celery-taskset-meta-*`) are not
listed: Celery gives them their life (`result_expires`).
"""

from __future__ import annotations

import re

from torchord.cache.errors import InvalidInput

PREFIX = "torchord"

RUN_TTL_SECONDS = 30 * 24 * 3600
RESULT_TTL_SECONDS = 7 * 24 * 3600
WORK_TTL_SECONDS = 24 * 3600
WAKE_TTL_SECONDS = 10
UNDERWAY_TTL_SECONDS = 60
BLOB_TTL_SECONDS = 30 * 24 * 3600
PREDICT_TTL_SECONDS = 3600
DATASET_TTL_SECONDS = 30 * 24 * 3600
DATASET_UPLOAD_TTL_SECONDS = 24 * 3600
DATASET_GRACE_SECONDS = 60
DATASET_RENEWAL_SECONDS = 3600
WORKER_LEASE_MS = 1500
WORKER_INDEX_TTL_SECONDS = 24 * 3600
SUPERVISOR_LEASE_MS = 1500
QUARANTINE_TTL_SECONDS = 7 * 24 * 3600
DISTRUST_TTL_SECONDS = 30 * 24 * 3600
EVENTS_KEPT = 5000
LEDGER_KEPT = 1000

RUNS = f"{PREFIX}:runs"
ACTIVE = f"{PREFIX}:active"
WORKERS = f"{PREFIX}:workers"
PLACEMENT = f"{PREFIX}:placement"
SUPERVISOR = f"{PREFIX}:supervisor"
TURNS = f"{PREFIX}:turns"
QUARANTINE = f"{PREFIX}:quarantine"
QUARANTINED = f"{PREFIX}:quarantined"
DISTRUSTED = f"{PREFIX}:distrusted"
DATASETS = f"{PREFIX}:datasets"
TELLING = f"{PREFIX}:telling"

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_NAME = re.compile(NAME_PATTERN)


def check_name(name: object, what: str = "run") -> str:
    """Return `name` if it can name a run or a dataset (a key, a folder and a URL path at once).

    Raises:
        InvalidInput: if it is not 1 to 100 letters, digits, dots, dashes or underscores.
    """
    if not isinstance(name, str) or not is_name(name):
        raise InvalidInput(
            f"{what} name {name!r:.120} cannot be used: give 1 to 100 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit, such as 'digits-01'"
        )
    return name


def is_name(name: object) -> bool:
    """Whether `check_name` takes it."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def worker(worker_id: str) -> str:
    """The heartbeat of one worker process."""
    return f"{PREFIX}:worker:{worker_id}"


def dataset(name: str) -> str:
    """The record of one stored dataset."""
    return f"{PREFIX}:dataset:{name}"


def dataset_renewed(name: str) -> str:
    """The mark that a dataset's life was renewed a short while ago."""
    return f"{PREFIX}:dataset:{name}:renewed"


def chunk(address: str) -> str:
    """Chunk prefix of one content-addressed chunk."""
    return f"{PREFIX}:chunk:{address}"


def slot_underway(slot: int) -> str:
    """What a slot's gradient is called while it is on its way."""
    return f"slot:{slot}"


PARAMETERS_UNDERWAY = "parameters"
"""What the next version is called while it is on its way."""


class RunKeys:
    """The keys of one run.

    Args:
        run: the run's name, already checked by `check_name`.
    """

    def __init__(self, run: str) -> None:
        root = f"{PREFIX}:{{{run}}}"
        self.run = run
        self.root = root
        self.spec = f"{root}:spec"
        self.head = f"{root}:head"
        self.manifest = f"{root}:manifest"
        self.versions = f"{root}:versions"
        self.pins = f"{root}:pins"
        self.ledger = f"{root}:ledger"
        self.expected = f"{root}:expected"
        self.claims = f"{root}:claims"
        self.events = f"{root}:events"
        self.evaluations = f"{root}:evaluations"
        self.pending_evaluations = f"{root}:evaluating"
        self.underway = f"{root}:underway"
        self.round = f"{root}:round"
        self.outbox = f"{root}:outbox"
        self.telling = f"{root}:telling"
        self.heard = f"{root}:heard"

    def lasting(self) -> list[str]:
        """The keys that live as long as the run can be asked about."""
        return [
            self.spec,
            self.head,
            self.manifest,
            self.versions,
            self.pins,
            self.ledger,
            self.expected,
            self.claims,
            self.events,
            self.evaluations,
            self.pending_evaluations,
            self.round,
            self.outbox,
            self.telling,
            self.heard,
        ]

    def slots(self, step: int) -> str:
        """The gradient slots of one global step."""
        return f"{self.root}:slots:{step}"

    def leases(self, step: int) -> str:
        """Who computes which shard of one global step."""
        return f"{self.root}:leases:{step}"

    def wake(self, worker_id: str) -> str:
        """What a participant of a round waits for."""
        return f"{self.root}:wake:{worker_id}"

    def parts(self, version: int) -> str:
        """Partial metrics of one evaluated version."""
        return f"{self.root}:parts:{version}"

    def predict(self, request: str) -> str:
        """Outputs of one prediction request."""
        return f"{self.root}:predict:{request}"

    def parameters_blob(self, version: int, nonce: str) -> str:
        """Chunk prefix of the parameters of one version."""
        return f"{PREFIX}:blob:{self.run}:parameters:{version}:{nonce}"

    def rest_blob(self, digest: str) -> str:
        """Chunk prefix of what rests from version to version, by its content."""
        return f"{PREFIX}:blob:{self.run}:rest:{digest}"

    def delta_blob(self, version: int, nonce: str) -> str:
        """Chunk prefix of how one version follows from the one before."""
        return f"{PREFIX}:blob:{self.run}:delta:{version}:{nonce}"

    def state_blob(self, version: int, nonce: str) -> str:
        """Chunk prefix of the optimizer state of one version."""
        return f"{PREFIX}:blob:{self.run}:state:{version}:{nonce}"

    def start_blob(self, nonce: str) -> str:
        """Chunk prefix of the weights that the run starts from."""
        return f"{PREFIX}:blob:{self.run}:start:{nonce}"

    def gradient_blob(self, step: int, shard: int, nonce: str) -> str:
        """Chunk prefix of one attempt at one gradient slot."""
        return f"{PREFIX}:blob:{self.run}:gradient:{step}:{shard}:{nonce}"

    def slot_state_blob(self, step: int, shard: int, nonce: str) -> str:
        """Chunk prefix of what one slot keeps after a step."""
        return f"{PREFIX}:blob:{self.run}:slot:{step}:{shard}:{nonce}"

    def evaluation_blob(self, version: int, part: int) -> str:
        """Chunk prefix of what one part of an evaluation keeps of its metrics."""
        return f"{PREFIX}:blob:{self.run}:evaluation:{version}:{part}"

    def predict_blob(self, request: str, part: int, side: str) -> str:
        """Chunk prefix of the inputs or outputs of one part of a prediction."""
        return f"{PREFIX}:blob:{self.run}:predict:{request}:{part}:{side}"
