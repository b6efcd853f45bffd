"""`Run.fork`: another run that begins at a version of this one, chained to the entry that made it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from torchord.cache.errors import (
    CheckpointError,
    ConfigMismatch,
    InvalidInput,
    RunError,
    RunNotFound,
    VersionMissing,
)
from torchord.cache.keyring import bare
from torchord.cache.ledger.incarnation import life
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import Head, LedgerEntry
from torchord.coordinator.master.audit import opened
from torchord.coordinator.master.stored_version import manifest_of
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.fingerprints import fingerprint
from torchord.coordinator.spec.recipe import Recipe, require_measured

if TYPE_CHECKING:
    from torchord.cache.files.checkpoint import CheckpointStore

_BESIDE = ("slots", "window")  # of a checkpoint's state: what belongs to shards, whatever the optimizer
CHANGEABLE = (
    "epochs",
    "stop_when",
    "keep",
    "evaluate_every",
    "evaluate_at_start",
    "checkpoint_every",
    "keep_checkpoints",
    "clip_norm",
    "max_shard_norm",
    "nonfinite",
    "shard_timeout_seconds",
    "max_attempts",
    "audit_fraction",
    "round_steps",
)
"""Fields of the config that leave alone which examples belong to which step."""


def forked_spec(
    spec: Mapping[str, Any], head: Head, entry: LedgerEntry, run: str, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """The spec of a fork, but for what it starts from.

    Args:
        spec: the parent's.
        head: likewise.
        entry: of the version that it is forked at.
        run: the parent's name.
        changes: `optimizer` and `scheduler` of the recipe, and fields of the config.

    Raises:
        InvalidInput: a field cannot be changed.
        ConfigError, RecipeError: a value cannot be used.
    """
    entries = {name: changes[name] for name in ("optimizer", "scheduler") if changes.get(name) is not None}
    given = {name: value for name, value in changes.items() if name not in ("optimizer", "scheduler")}
    if unknown := sorted(given.keys() - set(CHANGEABLE)):
        known = {field.name for field in fields(TrainingConfig)}
        why = "would move its examples" if unknown[0] in known else "is no field of TrainingConfig"
        raise InvalidInput(
            f"fork() changes optimizer, scheduler and {', '.join(CHANGEABLE)}; {unknown[0]} {why}: submit a "
            "new run with start_from=(run, version)"
        )
    recipe = replace(Recipe.from_spec(spec["recipe"]), **entries)
    config = replace(TrainingConfig.from_json(spec["config"]), **given)
    described = recipe.to_spec() if entries else {}
    made = {**spec["recipe"], **{name: described[name] for name in entries}}
    require_measured(recipe, made, config)
    switches = {at: values for at, values in spec.get("switches", {}).items() if int(at) <= entry.version}
    fork = {
        "run": run,
        "incarnation": life(head.incarnation),
        "version": entry.version,
        "chain": entry.chain,
        "parameters": entry.parameters,
        "fresh": bool(entries),
    }
    passed_on = {name: spec[name] for name in ("evaluation_seed", "skew") if name in spec}
    return {
        **passed_on,
        "recipe": made,
        "config": config.to_json(),
        "fingerprint": fingerprint(made),
        **({"switches": switches} if switches else {}),
        "fork": fork,
    }


def begun_from(
    services: Services, ledger: Ledger, checkpoints: CheckpointStore, entry: LedgerEntry, *, fresh: bool
) -> dict[str, Any]:
    """A version with what its next steps need beside it, as a checkpoint has it: {"tensors", "state"}.

    Args:
        entry: of the version.
        fresh: whether the optimizer begins anew.

    Raises:
        VersionMissing: it is stored nowhere, or without what is needed.
        RunError: what is stored is not what was committed.
    """
    version = entry.version
    if version in checkpoints.versions():
        found = checkpoints.load(version)
        if found.meta.get("chain") != entry.chain:
            raise RunError(
                f"run {ledger.run!r}: checkpoint {version} is not what the ledger has; see run.verify()"
            )
        tensors, state = found.tensors, found.state
    else:
        tensors, state = _cached(services, ledger, checkpoints, entry, fresh=fresh)
    kept = {name: state[name] for name in _BESIDE if name in state} if fresh else dict(state)
    return {"tensors": dict(tensors), "state": kept}


def _cached(
    services: Services, ledger: Ledger, checkpoints: CheckpointStore, entry: LedgerEntry, *, fresh: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    from torchord.cache.tensors.codec import views

    version = entry.version
    record = services.parameters.record(ledger, version)
    if record.digest != entry.parameters:
        raise RunError(f"run {ledger.run!r}: version {version} is not what was committed; see run.verify()")
    if record.state is None and not fresh:
        raise VersionMissing(
            f"version {version} of run {ledger.run!r} is stored without its optimizer's state; fork it with "
            f"an optimizer of its own, or at one of its checkpoints, {checkpoints.versions()}"
        )
    _, flat, _ = services.parameters.fetch(ledger, version)
    state = {} if record.state is None else dict(services.parameters.fetch_state(record.state))
    if record.slots:
        state["slots"] = {shard: services.gradients.get_state(kept) for shard, kept in record.slots.items()}
    return dict(views(flat, manifest_of(ledger))), state


def create(
    ledger: Ledger, services: Services, spec: dict[str, Any], start: Callable[[], dict[str, Any]]
) -> bool:
    """Create the fork unless it is there; False if it is.

    Args:
        ledger: of the fork.
        start: reads what it starts from.

    Raises:
        ConfigMismatch: the name is another run's.
    """
    fork = spec["fork"]
    there: dict[str, Any] | None = None
    with suppress(RunNotFound):
        ledger.head()
        there = ledger.spec()
    if there is None:
        stored = services.parameters.publish_start(ledger, start())
        begun = {**spec, "fork": {**fork, "start": stored.as_dict()}}
        incarnation = uuid.uuid4().hex[:12]
        there = ledger.create(begun, incarnation=incarnation, version=fork["version"], chain=fork["chain"])
        if there is None:
            return True
        services.chunks.delete(stored.blobs())  # created by another process meanwhile
    for name in ("fork", "recipe", "config"):
        ours, theirs = spec[name], there.get(name)
        if name == "fork":
            theirs = {key: value for key, value in (theirs or {}).items() if key != "start"}
        if ours != theirs:
            raise ConfigMismatch(
                f"run {ledger.run!r} exists with another {name}; choose another name for the fork"
            )
    return False


def unlike_parent(
    fork: Mapping[str, Any], ledger: Ledger, disk: Callable[[str], CheckpointStore]
) -> list[str]:
    """What is wrong about the entry that a fork is chained to.

    Args:
        fork: of the fork's spec.
        ledger: the parent's.
        disk: incarnation -> the parent's checkpoints.
    """
    version, run = fork["version"], fork["run"]
    found: list[str] = list(ledger.entry_texts(version, version).values())
    with suppress(CheckpointError):
        found += disk(fork["incarnation"]).entries_between(version, version).values()
    for text in found:
        entry = LedgerEntry.from_json(bare(text))
        whole = entry.computed_chain() == entry.chain and entry.computed_seal() == entry.seal
        if whole and (entry.chain, entry.parameters) == (fork["chain"], fork["parameters"]):
            return opened(ledger, {version: text}, version)[1]
    if found:
        return [f"version {version} of run {run!r} is not the one that this run was forked from"]
    return [
        f"the entry of version {version} of run {run!r}, which this run was forked from, is neither in Redis "
        "nor beside the checkpoints"
    ]
