"""A run's version as it is stored: in the cache, or among the checkpoints where the cache has it no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torchord.cache.errors import InvalidInput, VersionMissing
from torchord.cache.keyring import AnyKeyring, Places
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import Head
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.spec.config import TrainingConfig

if TYPE_CHECKING:
    from torch import Tensor

    from torchord.cache.files.checkpoint import CheckpointStore
    from torchord.cache.tensors.codec import Manifest


BEST: Literal["best"] = "best"
Version = int | Literal["best"] | None
"""A version that a person asks for: by its number, the best one, or None for the newest."""


def manifest_of(ledger: Ledger) -> Manifest:
    """The layout of a run's versions."""
    from torchord.cache.tensors.codec import Manifest

    return Manifest.from_json(ledger.manifest())


def best_version(ledger: Ledger, config: TrainingConfig) -> int:
    """The best version of a run so far, by its config's `keep`.

    Raises:
        InvalidInput: the config has none.
        VersionMissing: nothing is evaluated yet, or nothing that is a number.
    """
    keep = config.keep_rule
    if keep is None:
        raise InvalidInput(
            f"run {ledger.run!r} keeps no best version: submit it with TrainingConfig(keep='best'), or "
            "ask for one of run.evaluations() by its number"
        )
    if not (found := keep.best(ledger.evaluations())):
        raise VersionMissing(
            f"run {ledger.run!r} has no best version yet: no evaluation of it has measured {keep.metric!r}"
        )
    return found[0]


def stored_tensors(services: Services, ledger: Ledger, head: Head, version: int) -> dict[str, Tensor]:
    """A version's tensors by name, on the CPU.

    Raises:
        VersionMissing: it is neither in the cache nor among the checkpoints.
    """
    from torchord.cache.tensors.codec import views

    try:
        _, flat, _ = services.parameters.fetch(ledger, version)
        return views(flat, manifest_of(ledger))
    except VersionMissing as error:
        return checkpointed_tensors(services, head, version, error, ledger.run)


def checkpointed_tensors(
    services: Services, head: Head, version: int, missing: VersionMissing, run: str
) -> dict[str, Tensor]:
    """The tensors of a version that the cache has no more.

    Raises:
        VersionMissing: no checkpoint has it either.
    """
    from torchord.cache.files.checkpoint import CheckpointStore

    store = CheckpointStore(
        services.settings.checkpoint_dir, run, head.incarnation, keyring=services.file_keyring
    )
    if version not in store.versions():
        raise VersionMissing(
            f"{missing}; checkpoints hold {store.versions()}. Ask for one of these, or for the newest"
        ) from missing
    return store.load(version).tensors


def statement_of(keyring: AnyKeyring, checkpoints: CheckpointStore) -> str | None:
    """The statement beside a run's checkpoints, seal and all; None if there is none.

    Raises:
        NotAuthentic: this process has keys, and none that it trusts has sealed it.
    """
    text = checkpoints.load_statement()
    if text is not None:
        keyring.opened("server", Places(checkpoints.run).statement(), text)
    return text
