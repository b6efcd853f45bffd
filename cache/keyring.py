"""Who wrote a record: keys by role, and records that carry the seal of one.

Whoever can write to Redis can write any record. A sealed record says which role wrote it, and for which
place: its seal is computed over the record's exact text together with what it is, of which run and life, step
and number, so that it is refused anywhere else. A process without keys writes no seals and looks at none.

Two algorithms: `ed25519` (RFC 8032), whose verifiers cannot sign, for fleets whose machines do not trust each
other; `blake2b` (RFC 7693, keyed, 256 bits), which whoever verifies can also make, for processes of one user:
it costs a microsecond. Keys lie in files that their owner alone can read; see docs/keys.md.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torchord.cache.errors import InvalidInput, NoKey, NotAuthentic

log = logging.getLogger(__name__)

Role = Literal["submit", "worker", "server"]
ROLES: tuple[Role, ...] = ("submit", "worker", "server")
"""submit: specs and datasets. worker: slots, parts of evaluations and predictions, metrics. server: versions,
the ledger, checkpoints, statements."""

ALGORITHMS = ("ed25519", "blake2b")
_FORMAT = 1
_SEAL = re.compile(r'\{"sealed":"([0-9a-f]+) ([A-Za-z0-9+/=]+)"(?:,|(?=\}))')  # key id, seal; then the record
_LOOKED_AT_SECONDS = 2.0
_SECRET_NBYTES = 32

Sign = Callable[[bytes], bytes]
Verify = Callable[[bytes, bytes], bool]  # (seal, message)


def bare(text: str) -> str:
    """A record's text without its seal, whoever made that; as it is where there is none."""
    found = _SEAL.match(text)
    return text if found is None else "{" + text[found.end() :]


def _message(role: str, place: str, text: str) -> bytes:
    """What a seal is computed over; no two places give the same, since the place's length is in it."""
    return f"torchord {role} {len(place)} {place} {text}".encode()


@dataclass(frozen=True)
class _Keys:
    """What a key file holds: per role what this process signs with, and whom it believes, by key id."""

    local: bool
    own: Mapping[str, tuple[str, Sign]]
    trusted: Mapping[str, Mapping[str, Verify]]
    stamp: tuple[int, int, int]

    def verify(self, role: str, name: str) -> Verify | None:
        """What looks at seals of a key; None of one that is not believed in that role."""
        return self.trusted.get(role, {}).get(name)


class Keyring:
    """The keys of one process, read again when their file has changed.

    Args:
        path: of the file; see `write`.

    Raises:
        InvalidInput: the file cannot be read, others can read it, or it is no key file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        self._keys = _read(self.path)

    def __bool__(self) -> bool:
        return True

    @property
    def local(self) -> bool:
        """Whether these keys are a local cluster's and end with it: they seal nothing in files."""
        return self._keys.local

    def signs(self, role: Role) -> bool:
        """Whether this process holds a key of that role."""
        return role in self._current().own

    def sealed(self, role: Role, place: str, text: str) -> str:
        """A record's text with a seal.

        Args:
            place: what it is, and where: see `Places`.
            text: of a JSON object, as it will be stored.

        Raises:
            NoKey: this process has no key of the role.
        """
        key = self._current().own.get(role)
        if key is None:
            raise NoKey(
                f"writing {place} takes a key of the role {role!r}, and {self.path} has none: point "
                f"TORCHORD_KEYS at the file {role}.json that `torchord keys new` has made"
            )
        name, sign = key
        seal = base64.b64encode(sign(_message(role, place, text))).decode()
        return f'{{"sealed":"{name} {seal}"{"" if text == "{}" else ","}{text[1:]}'

    def opened(self, role: Role, place: str, text: str) -> str:
        """The text of a record that a key of the role has sealed for this place.

        Raises:
            NotAuthentic: it has no seal, or one that is not for it.
        """
        found = _SEAL.match(text)
        if found is None:
            raise NotAuthentic(f"{place} has no seal: whoever wrote it has no key; see docs/keys.md")
        name, seal, inner = found[1], found[2], "{" + text[found.end() :]
        verify = self._current().verify(role, name) or self._current(anew=True).verify(role, name)
        if verify is None:
            raise NotAuthentic(
                f"{place} is sealed by the key {name:.16}, which {self.path} does not trust as {role!r}"
            )
        if not verify(_decoded(seal), _message(role, place, inner)):
            raise NotAuthentic(f"{place} has a seal that is not for it: it was changed, or stood elsewhere")
        return inner

    def _current(self, *, anew: bool = False) -> _Keys:
        now = time.monotonic()
        if anew or now - self._looked > _LOOKED_AT_SECONDS:
            with self._lock:
                self._looked = now
                if (stamp := _stamp(self.path)) != self._keys.stamp:
                    try:
                        self._keys = _read(self.path)
                    except InvalidInput as error:
                        log.error("the keys that there were hold: %s", error)
                        self._keys = replace(self._keys, stamp=stamp)
        return self._keys


class NoKeys:
    """A keyring of a process that was given none: nothing is sealed, and every seal is taken off unread."""

    path = None
    local = False

    def __bool__(self) -> bool:
        return False

    def signs(self, role: Role) -> bool:
        """False."""
        return False

    def sealed(self, role: Role, place: str, text: str) -> str:
        """The text as it is."""
        return text

    def opened(self, role: Role, place: str, text: str) -> str:
        """The text without its seal, if it has one."""
        return bare(text)


AnyKeyring = Keyring | NoKeys
NO_KEYS = NoKeys()


def keyring(path: str, url: str) -> AnyKeyring:
    """The keyring of a file; for "" that of a local cluster at the URL, if there is one; for "off" none."""
    if path == "off":
        return NO_KEYS
    if path:
        return Keyring(path)
    local = local_path(url)
    return Keyring(local) if local is not None and local.exists() else NO_KEYS


class Places:
    """What a seal is for, in words, of one run: its name has no spaces.

    Args:
        run: the run's name.
    """

    def __init__(self, run: str) -> None:
        self.run = run

    def spec(self, incarnation: str) -> str:
        """The recipe and config of an incarnation."""
        return f"the spec of run {self.run} in its incarnation {incarnation}"

    def manifest(self, life: str) -> str:
        """The layout of a life's parameters."""
        return f"the manifest of run {self.run} in its life {life}"

    def version(self, version: int, life: str) -> str:
        """The record of a stored version."""
        return f"the record of version {version} of run {self.run} in its life {life}"

    def slot(self, step: int, number: int, revision: str) -> str:
        """A slot of a step."""
        return f"slot {number} of step {step} of run {self.run} in its revision {revision}"

    def entry(self, version: int) -> str:
        """An entry of the ledger; its chain binds it to those before."""
        return f"the ledger's entry {version} of run {self.run}"

    def part(self, version: int, part: int, life: str) -> str:
        """A part of an evaluation."""
        return f"part {part} of the evaluation of version {version} of run {self.run} in its life {life}"

    def metrics(self, version: int, life: str) -> str:
        """The figures of an evaluation."""
        return f"the metrics of version {version} of run {self.run} in its life {life}"

    def telling(self, id: str, life: str) -> str:
        """An entry of the outbox."""
        return f"entry {id} of the outbox of run {self.run} in its life {life}"

    def output(self, request: str, part: int) -> str:
        """A part of a prediction."""
        return f"part {part} of the prediction {request} from run {self.run}"

    def checkpoint(self, version: int, life: str) -> str:
        """A checkpoint's marker."""
        return f"the checkpoint of version {version} of run {self.run} in its life {life}"

    def statement(self) -> str:
        """What is stated of a run that is done."""
        return f"the statement of run {self.run}"


# --- key files ------------------------------------------------------------------------------------


def generate(algorithm: str) -> tuple[dict[str, str], dict[str, str]]:
    """A new key: what its owner keeps, and what those keep who are to believe it."""
    if algorithm == "blake2b":
        shared = {"algorithm": algorithm, "secret": _encoded(secrets.token_bytes(_SECRET_NBYTES))}
        return shared, shared
    if algorithm != "ed25519":
        raise InvalidInput(f"no algorithm {algorithm!r}; there are {', '.join(ALGORITHMS)}")
    private = _ed25519().Ed25519PrivateKey.generate()
    public = _encoded(private.public_key().public_bytes_raw())
    own = {"algorithm": algorithm, "secret": _encoded(private.private_bytes_raw()), "public": public}
    return own, {"algorithm": algorithm, "public": public}


def write(
    path: Path,
    own: Mapping[str, Mapping[str, str]],
    trusted: Mapping[str, Iterable[Mapping[str, str]]],
    *,
    local: bool = False,
    following: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Write a key file that its owner alone can read, whole or not at all.

    Args:
        own: role -> a key's first half, from `generate`.
        trusted: role -> the second halves of whoever is believed.
        local: see `Keyring.local`.
        following: role -> the half of a key that is to sign later.
    """
    believed = {role: list(halves) for role, halves in trusted.items()}
    told: dict[str, Any] = {"torchord_keys": _FORMAT, "local": local, "own": own, "trusted": believed}
    if following:
        told["next"] = following
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(told, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    """What a key file says, as `write` has written it.

    Raises:
        InvalidInput: it cannot be read, others can read it, or it is no key file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(descriptor, encoding="utf-8") as file:
            found = os.fstat(file.fileno())
            told = json.load(file)
    except OSError as error:
        raise InvalidInput(f"the key file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidInput(f"{path} is no key file of torchord: it is no JSON ({error})") from error
    if not isinstance(told, dict) or told.get("torchord_keys") != _FORMAT:
        raise InvalidInput(f"{path} is no key file of torchord; `torchord keys new DIRECTORY` makes some")
    if found.st_uid not in (os.geteuid(), 0) or found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InvalidInput(
            f"others can read or write the key file {path}: make it its owner's alone (chmod 600 {path})"
        )
    return told


def key_id(half: Mapping[str, str]) -> str:
    """Names a key, by either half; tells nothing of its secret."""
    half_id = half.get("public") or half["secret"]
    return hashlib.blake2b(half_id.encode(), digest_size=6, person=b"torchord-key-id").hexdigest()


def _read(path: Path) -> _Keys:
    stamp = _stamp(path)
    told = read(path)
    try:
        own = {role: (key_id(half), _signer(half)) for role, half in told["own"].items()}
        trusted = {
            role: {key_id(half): _verifier(half) for half in halves}
            for role, halves in told["trusted"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInput(f"{path} is a damaged key file ({type(error).__name__}: {error})") from error
    if unknown := (own.keys() | trusted.keys()) - set(ROLES):
        raise InvalidInput(f"{path} has keys of a role {min(unknown)!r}; there are {', '.join(ROLES)}")
    return _Keys(told.get("local") is True, own, trusted, stamp)


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:  # it is being replaced, or gone: what was read of it holds
        return (0, 0, 0)
    return found.st_ino, found.st_mtime_ns, found.st_size


def _signer(half: Mapping[str, str]) -> Sign:
    secret = _decoded(half["secret"])
    if half["algorithm"] == "blake2b":
        return partial(_keyed, _whole(secret))
    if half["algorithm"] != "ed25519":
        raise ValueError(f"no algorithm {half['algorithm']!r}")
    sign: Sign = _ed25519().Ed25519PrivateKey.from_private_bytes(secret).sign
    return sign


def _verifier(half: Mapping[str, str]) -> Verify:
    if half["algorithm"] == "blake2b":
        secret = _whole(_decoded(half["secret"]))
        return lambda seal, message: hmac.compare_digest(seal, _keyed(secret, message))
    if half["algorithm"] != "ed25519":
        raise ValueError(f"no algorithm {half['algorithm']!r}")
    verify = _ed25519().Ed25519PublicKey.from_public_bytes(_decoded(half["public"])).verify

    def holds(seal: bytes, message: bytes) -> bool:
        from cryptography.exceptions import InvalidSignature  # loaded by now

        try:
            verify(seal, message)
        except InvalidSignature:
            return False
        return True

    return holds


def _whole(secret: bytes) -> bytes:
    if len(secret) != _SECRET_NBYTES:
        raise ValueError(f"a secret of {len(secret)} bytes; it has {_SECRET_NBYTES}")
    return secret


def _keyed(secret: bytes, message: bytes) -> bytes:
    return hashlib.blake2b(message, key=secret, digest_size=32).digest()


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise InvalidInput(
            "keys of ed25519 take the package cryptography: pip install 'torchord[keys]'"
        ) from None
    return ed25519


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return b""


# --- a local cluster's keys -----------------------------------------------------------------------


def local_path(url: str) -> Path | None:
    """Where the keys of this user's local cluster at a URL lie; None where there is no safe place for any."""
    folder = Path(tempfile.gettempdir()) / f"torchord-keys-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        return None  # somebody else's
    return folder / f"{hashlib.blake2b(url.encode(), digest_size=12).hexdigest()}.json"


def write_local(path: Path, kept: Path | None = None) -> None:
    """Write keys for processes of one user that believe each other: a secret for each role.

    Args:
        path: where they are found, see `local_path`.
        kept: where they outlive the cluster, for a server whose data do; None: they are drawn anew.
    """
    if kept is not None and kept.exists():
        told = read(kept)
        write(path, told["own"], told["trusted"], local=True)
        return
    halves = {str(role): generate("blake2b") for role in ROLES}
    own = {role: mine for role, (mine, _) in halves.items()}
    trusted = {role: [theirs] for role, (_, theirs) in halves.items()}
    for place in (path, kept):
        if place is not None:
            write(place, own, trusted, local=True)
