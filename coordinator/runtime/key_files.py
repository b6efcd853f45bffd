"""Key files for a fleet: made, renewed step by step, shown.

They lie in one directory of whoever runs the fleet, a file for each kind of process, and are copied to the
machines. Each process reads its file anew when it changes, so keys are renewed without a restart.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchord.cache.errors import InvalidInput
from torchord.cache.keyring import ROLES, Role, generate, key_id, read, write

FILES: dict[str, tuple[Role, ...]] = {
    "submit.json": ("submit",),
    "worker.json": ("worker",),
    "server.json": ("server",),
    "fleet.json": ("worker", "server"),
    "monitor.json": (),
}
"""The roles that each file signs as: for programs that submit; for workers on the queue of gradients, of
updates, or of both; for whoever only looks."""


def new(directory: Path, algorithm: str) -> list[Path]:
    """Make keys for a new fleet.

    Args:
        directory: made if it is not there.
        algorithm: see `torchord.cache.keyring.ALGORITHMS`.

    Returns:
        The files.

    Raises:
        InvalidInput: there are keys already.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if there := [name for name in FILES if (directory / name).exists()]:
        raise InvalidInput(
            f"{directory} has keys already ({', '.join(there)}): name another directory, or renew them with "
            f"`torchord keys rotate {directory} ROLE`"
        )
    halves: dict[str, tuple[dict[str, str], dict[str, str]]] = {role: generate(algorithm) for role in ROLES}
    trusted = {role: [theirs] for role, (_, theirs) in halves.items()}
    made = []
    for name, roles in FILES.items():
        write(directory / name, {role: halves[role][0] for role in roles}, trusted)
        made.append(directory / name)
    return made


def renew(directory: Path, role: Role) -> list[Path]:
    """Add a new key of a role beside the old one: believed by all from now on, and not used yet.

    Raises:
        InvalidInput: there are no keys, or the role is being renewed already.
    """
    files = list(_files(directory))
    if any(role in told.get("next", {}) for _, told in files):
        raise InvalidInput(
            f"a new key of the role {role!r} is there already: copy the files to every machine, then "
            f"`torchord keys rotate {directory} {role} --switch`"
        )
    mine, theirs = generate(files[0][1]["trusted"][role][0]["algorithm"])
    for _, told in files:
        told["trusted"][role] = [*told["trusted"][role], theirs]
        if role in told["own"]:
            told["next"] = {**told.get("next", {}), role: mine}
    return _written(files)


def switch(directory: Path, role: Role) -> list[Path]:
    """Have the new key sign; the old one is still believed.

    Raises:
        InvalidInput: there is no new key.
    """
    files = list(_files(directory))
    if not any(role in told.get("next", {}) for _, told in files):
        raise InvalidInput(
            f"there is no new key of the role {role!r}: `torchord keys rotate {directory} {role}` makes one"
        )
    for _, told in files:
        if (mine := told.get("next", {}).pop(role, None)) is not None:
            told["own"][role] = mine
    return _written(files)


def forget(directory: Path, role: Role) -> list[Path]:
    """Believe the newest key of a role alone: what older ones have sealed is refused from then on.

    Raises:
        InvalidInput: the newest does not sign yet, or there is no older one.
    """
    files = list(_files(directory))
    if any(role in told.get("next", {}) for _, told in files):
        raise InvalidInput(
            f"the new key of the role {role!r} does not sign yet: `torchord keys rotate {directory} {role} "
            "--switch`, and copy the files to every machine"
        )
    if all(len(told["trusted"][role]) == 1 for _, told in files):
        raise InvalidInput(f"there is one key of the role {role!r} and no older one to forget")
    for _, told in files:
        told["trusted"][role] = told["trusted"][role][-1:]
    return _written(files)


def shown(path: Path) -> dict[str, Any]:
    """What a key file holds, without its secrets: what it signs with, and the ids of the keys it believes."""
    told = read(path)
    return {
        "path": str(path),
        "signs": {role: f"{half['algorithm']} {key_id(half)}" for role, half in told["own"].items()},
        "believes": {role: [key_id(half) for half in halves] for role, halves in told["trusted"].items()},
        "next": {role: key_id(half) for role, half in told.get("next", {}).items()},
    }


def _files(directory: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    missing = [name for name in FILES if not (directory / name).exists()]
    if missing:
        raise InvalidInput(
            f"{directory} lacks {', '.join(missing)}; `torchord keys new {directory}` makes a fleet's keys"
        )
    for name in FILES:
        yield directory / name, read(directory / name)


def _written(files: list[tuple[Path, dict[str, Any]]]) -> list[Path]:
    for path, told in files:
        write(path, told["own"], told["trusted"], following=told.get("next", {}))
    return [path for path, _ in files]
