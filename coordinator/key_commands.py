"""`torchord keys`: make, renew and show the files of keys that records are sealed with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from torchord.cache.errors import TorchordError
from torchord.cache.keyring import ALGORITHMS, ROLES

_OK, _USAGE = 0, 2


def _guarded(perform: Callable[[], object]) -> int:
    """Do it; what it raises is one line and an exit code."""
    try:
        perform()
    except TorchordError as error:
        print(f"error: {error}", file=sys.stderr)
        return _USAGE
    return _OK


def _made(make: Callable[[], list[Path]], then: str) -> int:
    def perform() -> None:
        for path in make():
            print(path)
        print(then, file=sys.stderr)

    return _guarded(perform)


@click.group("keys", help="Make and renew the keys that records are sealed with.")
def keys() -> None:
    """See the help."""


@keys.command("new")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--algorithm", type=click.Choice(ALGORITHMS), default="ed25519", show_default=True)
def _new(directory: Path, algorithm: str) -> int:
    """Make the key files of a new fleet in DIRECTORY."""
    from torchord.coordinator.runtime import key_files

    then = "Copy each to the machines that need it, as its owner's alone, and set TORCHORD_KEYS there."
    return _made(lambda: key_files.new(directory, algorithm), then)


@keys.command("rotate")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("role", type=click.Choice(ROLES))
@click.option("--switch", "step", flag_value="switch", help="Second step: the new key signs.")
@click.option("--forget", "step", flag_value="forget", help="Third step: older keys are believed no more.")
def _rotate(directory: Path, role: Any, step: str | None) -> int:
    """Renew a ROLE's key in three steps, each followed by a copy of the files to the machines.

    The first adds a new key that all believe and nobody uses. Nothing is stopped in between.
    """
    from torchord.coordinator.runtime import key_files

    perform = {"switch": key_files.switch, "forget": key_files.forget}.get(step or "", key_files.renew)
    return _made(lambda: perform(directory, role), "Copy them to the machines before the next step.")


@keys.command("show")
@click.argument("file", type=click.Path(path_type=Path))
def _show(file: Path) -> int:
    """Say what a key FILE holds, without its secrets."""
    from torchord.coordinator.runtime import key_files

    return _guarded(lambda: print(json.dumps(key_files.shown(file), indent=1)))
