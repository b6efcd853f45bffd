"""`CheckpointStore`: versions of a run on disk or at any fsspec URL.

A checkpoint is two safetensors files (the state tensors, the optimizer's tensors) and a
marker, a JSON file with their checksums. The marker is written last, so a checkpoint either
has a marker and is whole, or does not exist. Beside the checkpoints lie the run's spec and
its ledger, so that a run survives the loss of its Redis. Nothing is pickled.

Layout of `<root>/<run>/`:

    run.json                                recipe, config and incarnation of the name's present life

and below that, in a folder named by the incarnation:

    version-000000100.tensors.safetensors   parameters and buffers of version 100
    version-000000100.state.safetensors     tensors of optimizer and scheduler
    version-000000100.json                  the marker: everything else, and checksums
    statement.json                          of a run that is done, where there are keys: what it has made
    ledger-000000001-000000100.jsonl        ledger entries of versions 1 to 100, one JSON object a line
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor

from torchord.cache.blobs.content_digest import content_digest, require_content
from torchord.cache.errors import (
    CheckpointError,
    ChunkCorrupt,
    InvalidInput,
    ManifestMismatch,
    NotAuthentic,
)
from torchord.cache.files.folder import open_folder
from torchord.cache.keyring import NO_KEYS, AnyKeyring, Places
from torchord.cache.ledger.figures import tagged, untagged
from torchord.cache.ledger.incarnation import life
from torchord.cache.reading import ANY, COUNT, FOREIGN, OBJECT, TEXT, TEXTS, Fields, parsed
from torchord.cache.tensors import tree
from torchord.cache.tensors.codec import dtype_name, dtype_of

log = logging.getLogger(__name__)

_FORMAT = 1
_MARKER = re.compile(r"version-(\d+)\.json")
_FILE = re.compile(r"version-(\d+)\.(?:tensors|state)\.safetensors")
_SEGMENT = re.compile(r"ledger-(\d+)-(\d+)\.jsonl")
_SPEC = "run.json"
_STATEMENT = "statement.json"
_FILE_ENTRY = Fields(
    "the entry of a file",
    {"name": TEXT, "nbytes": COUNT, "xxh3_128": TEXT, "order": TEXTS, "raw": OBJECT},
    open=True,
    error=CheckpointError,
)
_MARKER_FIELDS = Fields(
    "it", {"state": ANY, "meta": OBJECT, "files": OBJECT}, open=True, error=CheckpointError
)
_COMMON = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.float16, torch.bfloat16, torch.float32, torch.float64}
)
"""What every safetensors reader knows; tensors of other dtypes (complex, float8, ...) go as bytes."""


@dataclass(frozen=True)
class Checkpoint:
    """One version as it was saved.

    Attributes:
        version: the parameter version.
        tensors: name -> state tensor (parameters and buffers), on the CPU.
        state: the tree that was given to `save` (see `torchord.cache.tensors.tree`).
        meta: the JSON-able dict that was given to `save`.
        skipped: for `CheckpointStore.latest`: one line for each newer checkpoint that was
            passed over because it is damaged.
    """

    version: int
    tensors: dict[str, Tensor]
    state: Any
    meta: dict[str, Any]
    skipped: tuple[str, ...] = ()


class CheckpointStore:
    """The checkpoints, spec and ledger of one run.

    Args:
        root: directory, or fsspec URL such as "s3://bucket/runs", above all runs' folders.
        run: name of the run, which is the name of its folder.
        incarnation: id of this life of the name, the folder below that: a run submitted anew under a
            name that was used before must not find the other's checkpoints. Its revisions share the
            folder. None keeps the files in the run's own folder.
        keyring: seals markers, which then name a digest of each file that proves it, and opens them.
        fault: called before a marker is written; tests use it to die there.

    Raises:
        CheckpointError: no fsspec driver serves the URL.
    """

    def __init__(
        self,
        root: str,
        run: str,
        incarnation: str | None = None,
        *,
        keyring: AnyKeyring = NO_KEYS,
        fault: Callable[[str], None] = lambda point: None,
    ) -> None:
        self.run = run
        self._keyring = keyring
        self._life = "" if incarnation is None else life(incarnation)
        self._home = open_folder(root, run)
        self._files = self._home if incarnation is None else open_folder(root, f"{run}/{self._life}")
        self._sequence: int | None = None
        self._fault = fault

    def path(self, version: int | None = None) -> str:
        """Return where the run's files lie, a directory or URL, or where one version's marker does."""
        return self._files.path if version is None else self._files.where(_marker_name(version))

    # --- versions -----------------------------------------------------------------------

    def save(
        self, version: int, tensors: Mapping[str, Tensor], state: Any, meta: Mapping[str, Any] | None = None
    ) -> int:
        """Write one checkpoint; its marker comes last, so that it exists whole or not at all.

        Saving a version again replaces it.

        Args:
            version: the parameter version, from 0.
            tensors: name -> state tensor, any dtype, shape, strides and device.
            state: tree of plain values and tensors, e.g. `Trainer.state()`.
            meta: JSON-able facts to keep with it; figures may be NaN or infinite.

        Returns:
            Bytes written.

        Raises:
            CheckpointError: the place cannot be written, or `state` or `meta` holds something
                that cannot be saved.
        """
        skeleton, state_tensors = tree.flatten(state)
        marker: dict[str, Any] = {
            "format": _FORMAT,
            "run": self.run,
            "version": version,
            "state": skeleton,
            "meta": tagged(dict(meta or {})),
            "files": {},
        }
        nbytes = 0
        for part, mapping in (("tensors", tensors), ("state", state_tensors)):
            name = f"version-{version:09d}.{part}.safetensors"
            data, index = _to_safetensors(mapping)
            self._files.write(name, data)
            marker["files"][part] = {
                "name": name,
                "nbytes": len(data),
                "xxh3_128": xxhash.xxh3_128_hexdigest(data),
                **({"content": content_digest("blake3", data)} if self._keyring else {}),
                **index,
            }
            nbytes += len(data)
        try:
            marker["checksum"] = _checksum(marker)
            text = json.dumps(marker, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint's meta is not JSON-able: {error}") from error
        data = self._keyring.sealed("server", self._place(version), text).encode()
        self._fault("server.mid_checkpoint")
        self._files.write(_marker_name(version), data)
        return nbytes + len(data)

    def versions(self) -> list[int]:
        """Return the versions that have a marker, ascending; they may still be damaged."""
        found = (_MARKER.fullmatch(name) for name in self._files.names())
        return sorted(int(match[1]) for match in found if match)

    def load(self, version: int) -> Checkpoint:
        """Read one checkpoint and verify every byte of it.

        Raises:
            CheckpointError: it does not exist or is damaged; the message names the file.
        """
        marker = self._marker(version)
        parts: dict[str, dict[str, Tensor]] = {}
        for part, entry in marker["files"].items():
            where = self._files.where(entry["name"])
            parts[part] = _from_safetensors(self._verified(entry), entry, where)
        state = tree.unflatten(marker["state"], parts["state"])
        return Checkpoint(version, parts["tensors"], state, untagged(marker["meta"]))

    def meta(self, version: int) -> dict[str, Any]:
        """What `save` was given as `meta`; the tensors are not read.

        Raises:
            CheckpointError: there is no such checkpoint, or its marker is damaged.
        """
        found: dict[str, Any] = untagged(self._marker(version)["meta"])
        return found

    def latest_version(self, at_most: int | None = None) -> int | None:
        """Return the newest version whose checkpoint is whole, every byte verified; None if none is.

        Args:
            at_most: consider versions up to this one only; None: all.
        """
        for version in reversed(self.versions()):
            if at_most is None or version <= at_most:
                try:
                    for entry in self._marker(version)["files"].values():
                        self._verified(entry)
                except CheckpointError as error:
                    log.warning("run %s: checkpoint %d passed over: %s", self.run, version, error)
                    continue
                return version
        return None

    def latest(self) -> Checkpoint | None:
        """Read the newest checkpoint that is whole; None if the run has none at all.

        Raises:
            CheckpointError: there are checkpoints, but all are damaged.
        """
        skipped: list[str] = []
        for version in reversed(self.versions()):
            try:
                found = self.load(version)
            except CheckpointError as error:
                log.warning("run %s: checkpoint %d passed over: %s", self.run, version, error)
                skipped.append(f"version {version}: {error}")
                continue
            return Checkpoint(found.version, found.tensors, found.state, found.meta, tuple(skipped))
        if skipped:
            raise CheckpointError(f"every checkpoint in {self.path()} is damaged: " + "; ".join(skipped))
        return None

    def prune(self, keep: int, also: Collection[int] = ()) -> list[int]:
        """Delete all but the newest checkpoints, and leavings of interrupted saves before them.

        A checkpoint of version 0 stays: the run started from weights that no recipe makes again.

        Args:
            keep: how many to keep, at least 1.
            also: versions to keep besides.

        Returns:
            The versions that were deleted.
        """
        versions = [version for version in self.versions() if version > 0]
        kept = versions[-max(keep, 1) :]
        gone = [version for version in versions[: len(versions) - len(kept)] if version not in also]
        for version in gone:  # the marker first, so that it never stands for files that are gone
            self._files.remove(_marker_name(version))
        for name in self._files.names():
            match = _FILE.fullmatch(name)
            if match and kept and 0 < int(match[1]) < kept[0] and int(match[1]) not in also:
                self._files.remove(name)
        return gone

    # --- spec and ledger ----------------------------------------------------------------

    def save_spec(self, spec: Mapping[str, Any]) -> None:
        """Write the run's recipe and config (a JSON-able dict), so that it can be resumed without Redis."""
        self._home.write(_SPEC, json.dumps(spec, allow_nan=False, indent=1).encode())

    def load_spec(self) -> dict[str, Any] | None:
        """Return what `save_spec` wrote, None if there is nothing.

        Raises:
            CheckpointError: the file is unreadable.
        """
        if _SPEC not in self._home.names():
            return None
        found: dict[str, Any] = _parse(self._home.read(_SPEC), self._home.where(_SPEC))
        return found

    def save_statement(self, text: str) -> None:
        """Write what is stated of the run that is done, sealed."""
        self._files.write(
            _STATEMENT, self._keyring.sealed("server", Places(self.run).statement(), text).encode()
        )

    def load_statement(self) -> str | None:
        """Return what `save_statement` wrote, seal and all; None if there is nothing."""
        if _STATEMENT not in self._files.names():
            return None
        return self._files.read(_STATEMENT).decode(errors="replace")

    def append_ledger(self, entries: Sequence[str]) -> None:
        """Write entries of consecutive versions as one more segment of the ledger.

        Args:
            entries: JSON objects as text, in order, each with an integer "version". Where a
                version was written before, the later entry counts.
        """
        if not entries:
            return
        if self._sequence is None:
            self._sequence = max((sequence for sequence, _ in self._segments()), default=0)
        self._sequence += 1
        lines = [
            json.dumps({"sequence": self._sequence}),
            *(" ".join(entry.split("\n")) for entry in entries),
        ]
        first, last = (_integer_in(entry, "version", "a ledger entry") for entry in (entries[0], entries[-1]))
        text = "".join(f"{line}\n" for line in lines)
        self._files.write(f"ledger-{first:09d}-{last:09d}.jsonl", text.encode())

    def read_ledger(self) -> list[str]:
        """Return the entries of all segments in order of version, for each the latest written.

        Raises:
            CheckpointError: a segment is damaged.
        """
        merged: dict[int, str] = {}
        for _, entries in sorted(self._segments(), key=lambda item: item[0]):
            merged.update(entries)
        return [merged[version] for version in sorted(merged)]

    def entries_between(self, first: int, last: int) -> dict[int, str]:
        """The entries of versions `first` to `last`, each the latest written; other segments are not read.

        Raises:
            CheckpointError: a segment is damaged.
        """
        merged: dict[int, str] = {}
        for _, entries in sorted(self._segments(first, last), key=lambda item: item[0]):
            merged.update(entries)
        return {version: text for version, text in merged.items() if first <= version <= last}

    def last_entry(self) -> int:
        """The newest version of which there is an entry, 0 if there is none."""
        found = (_SEGMENT.fullmatch(name) for name in self._files.names())
        return max((int(match[2]) for match in found if match), default=0)

    def _segments(self, first: int = 0, last: int | None = None) -> list[tuple[int, dict[int, str]]]:
        """Return (sequence number, version -> entry) of each segment; the higher number is the later.

        Args:
            first: what ends before this version is left out, and
            last: what begins after this one.
        """
        found = []
        for name in self._files.names():
            match = _SEGMENT.fullmatch(name)
            if match and int(match[2]) >= first and (last is None or int(match[1]) <= last):
                where = self._files.where(name)
                header, *lines = (
                    self._files.read(name).decode(errors="replace").removesuffix("\n").split("\n")
                )
                sequence = _integer_in(header, "sequence", where)
                found.append((sequence, {_integer_in(line, "version", where): line for line in lines}))
        return found

    def _verified(self, entry: Mapping[str, Any]) -> bytes:
        """Read one file that a marker lists and compare it with its checksum."""
        data = self._files.read(entry["name"])
        if len(data) != entry["nbytes"] or xxhash.xxh3_128_hexdigest(data) != entry["xxh3_128"]:
            raise CheckpointError(f"{self._files.where(entry['name'])} is damaged: its checksum differs")
        if self._keyring:
            try:
                require_content(self._files.where(entry["name"]), str(entry.get("content") or "none"), data)
            except (ChunkCorrupt, InvalidInput) as error:
                raise CheckpointError(str(error)) from error
        return data

    def _place(self, version: int) -> str:
        return Places(self.run).checkpoint(version, self._life)

    def _marker(self, version: int) -> dict[str, Any]:
        name = _marker_name(version)
        try:
            text = self._files.read(name).decode()
            text = self._keyring.opened("server", self._place(version), text)
        except (UnicodeDecodeError, NotAuthentic) as error:
            raise CheckpointError(f"{self._files.where(name)} cannot be believed: {error}") from error
        marker = _parse(text, self._files.where(name))
        if not isinstance(marker, dict) or not _is_whole(marker):
            raise CheckpointError(f"{self._files.where(name)} is damaged: its checksum differs")
        where = self._files.where(name)
        if marker.get("format") != _FORMAT:
            raise CheckpointError(
                f"{where} has format {marker.get('format')!r:.20}, this version of torchord reads {_FORMAT}"
            )
        try:
            files = _MARKER_FIELDS.of(marker)["files"]
            if files.keys() != {"tensors", "state"}:
                raise CheckpointError(f"it lists the files {', '.join(files)!r:.99}")
            for part, found in files.items():
                entry = _FILE_ENTRY.of(found)
                if entry["name"] != f"version-{version:09d}.{part}.safetensors":
                    raise CheckpointError(f"it names {entry['name']!r:.99}")
        except CheckpointError as error:
            raise CheckpointError(f"{where} is damaged: {error}") from None
        return marker


def runs_in(root: str) -> list[str]:
    """Names of the runs that have a folder under a checkpoint directory or URL.

    Raises:
        CheckpointError: it cannot be listed.
    """
    return open_folder(root, "").folders()


# --- encoding ---------------------------------------------------------------------------


def _marker_name(version: int) -> str:
    return f"version-{version:09d}.json"


def _checksum(marker: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(marker, sort_keys=True, allow_nan=False).encode())


def _is_whole(marker: dict[str, Any]) -> bool:
    """Take a marker's checksum off it; False if it is another's."""
    try:
        return bool(marker.pop("checksum", None) == _checksum(marker))
    except ValueError:  # it has a NaN, which none has that was written here
        return False


def _integer_in(text: str, key: str, where: str) -> int:
    found = _parse(text, where)
    value = found.get(key) if isinstance(found, dict) else None
    if type(value) is not int:
        raise CheckpointError(f"{where} is damaged: it has a line without {key}")
    return value


def _parse(data: bytes | str, where: str) -> Any:
    return parsed(data, f"{where} is damaged: it", error=CheckpointError)


def _to_safetensors(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, Any]]:
    """Serialise tensors.

    Returns:
        (content, index): index has "order", the names in the order of the mapping, and "raw",
        name -> [dtype, shape] of those whose dtype goes as bytes.
    """
    plain: dict[str, Tensor] = {}
    raw: dict[str, list[Any]] = {}
    for name, tensor in tensors.items():
        dense = (
            tensor.detach()
            .to("cpu")
            .resolve_conj()
            .resolve_neg()
            .clone(memory_format=torch.contiguous_format)
        )
        if dense.dtype not in _COMMON:
            raw[name] = [dtype_name(dense.dtype), list(dense.shape)]
            dense = dense.reshape(-1).view(torch.uint8)
        plain[name] = dense
    return safetensors.torch.save(plain), {"order": list(plain), "raw": raw}


def _from_safetensors(data: bytes, index: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    try:
        found = safetensors.torch.load(data)
        for name, (dtype, shape) in index["raw"].items():
            found[name] = found[name].view(dtype_of(dtype)).reshape(shape)
        return {name: found[name] for name in index["order"]}
    except (SafetensorError, RuntimeError, ManifestMismatch, *FOREIGN) as error:
        raise CheckpointError(f"{where} is damaged: {error}") from error
