"""`torchord keys`: make, renew and show the files of keys that records are sealed with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from torchord.cache.keyring import ALGORITHMS, ROLES
from torchord.coordinator.commands.common import OK, USAGE, guarded, told, with_json


def _made(make: Callable[[], list[Path]], then: str, *, as_json: bool) -> int:
    def perform() -> int:
        paths = [str(path) for path in make()]
        told("\n".join(paths), {"files": paths}, as_json=as_json)
        if not as_json:
            click.echo(then, err=True)
        return OK

    return _guarded(perform)


def _guarded(perform: Callable[[], int]) -> int:
    return USAGE if guarded(perform) else OK


@click.group("keys", help="Make and renew the keys that records are sealed with.")
def keys() -> None:
    """See the help."""


@keys.command("new")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--algorithm", type=click.Choice(ALGORITHMS), default="ed25519", show_default=True)
@with_json
def _new(directory: Path, algorithm: str, as_json: bool) -> int:
    """Make the key files of a new fleet in DIRECTORY."""
    from torchord.coordinator.runtime import key_files

    then = "Copy each to the machines that need it, as its owner's alone, and set TORCHORD_KEYS there."
    return _made(lambda: key_files.new(directory, algorithm), then, as_json=as_json)


@keys.command("rotate")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("role", type=click.Choice(ROLES))
@click.option("--switch", "step", flag_value="switch", help="Second step: the new key signs.")
@click.option("--forget", "step", flag_value="forget", help="Third step: older keys are believed no more.")
@with_json
def _rotate(directory: Path, role: Any, step: str | None, as_json: bool) -> int:
    """Renew a ROLE's key in three steps, each followed by a copy of the files to the machines.

    The first adds a new key that all believe and nobody uses. Nothing is stopped in between.
    """
    from torchord.coordinator.runtime import key_files

    perform = {"switch": key_files.switch, "forget": key_files.forget}.get(step or "", key_files.renew)
    then = "Copy them to the machines before the next step."
    return _made(lambda: perform(directory, role), then, as_json=as_json)


@keys.command("show")
@click.argument("file", type=click.Path(path_type=Path))
@with_json
def _show(file: Path, as_json: bool) -> int:
    """Say what a key FILE holds, without its secrets, as JSON."""
    from torchord.coordinator.runtime import key_files

    def perform() -> int:
        click.echo(json.dumps(key_files.shown(file), indent=None if as_json else 1))
        return OK

    return _guarded(perform)
