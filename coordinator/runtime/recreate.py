"""Creating a run again that its Redis has forgotten, from what lies beside its checkpoints."""

from __future__ import annotations

import json

from torchord.cache.errors import RunNotFound
from torchord.cache.ledger.records import GENESIS
from torchord.coordinator.runtime.services import Services


def recreate(services: Services, run: str) -> int:
    """Create the run from its spec on disk, its head at the newest whole checkpoint.

    Creating is atomic: of several processes that try, one does it. The training server that takes
    the run over then loads the checkpoint; what came after it is computed again, with the same bits.

    Returns:
        The version it goes on from.

    Raises:
        RunNotFound: no spec of the run lies under the checkpoint directory.
        CheckpointError: what lies there is damaged.
        CacheUnreachable: Redis does not answer.
    """
    from torchord.cache.files.checkpoint import CheckpointStore  # loads torch

    place = services.settings.checkpoint_dir
    spec = CheckpointStore(place, run).load_spec()
    if spec is None:
        raise RunNotFound(
            f"run {run!r} is neither in Redis nor under {place}; set TORCHORD_CHECKPOINT_DIR to where its "
            "checkpoints are"
        )
    incarnation, sealed = str(spec.pop("incarnation")), str(spec.pop("sealed", ""))
    keyring, ledger = services.file_keyring, services.ledger(run)
    if keyring:  # the file is no proof of what was submitted, its seal is
        spec = json.loads(keyring.opened("submit", ledger.places.spec(incarnation), sealed))
    latest = CheckpointStore(place, run, incarnation, keyring=keyring).latest()
    version, chain = (0, GENESIS) if latest is None else (latest.version, str(latest.meta["chain"]))
    text = sealed if keyring else None
    if ledger.create(spec, incarnation=incarnation, version=version, chain=chain, sealed=text) is None:
        evaluations = {} if latest is None else latest.meta.get("evaluations", {})
        for evaluated, metrics in evaluations.items():
            ledger.record_evaluation(int(evaluated), metrics)
        ledger.emit("restored", {"version": version})
    return version
