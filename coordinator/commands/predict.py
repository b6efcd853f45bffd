"""`torchord predict NAME INPUTS`: what a run's newest version says of some inputs, by its workers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from torchord.cache.errors import InvalidInput
from torchord.coordinator.commands.common import OK, guarded, of_a_run, settings_of, told


@click.command(
    "predict",
    help="Have the workers compute the outputs for INPUTS, a file .npy or .safetensors (an example a row), "
    ".json (nested lists), or - for JSON on stdin. They are printed as JSON.",
)
@of_a_run
@click.argument("inputs")
@click.option("--version", type=int, help="A stored version (default: the newest).")
@click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True)
@click.option("--timeout", type=float, metavar="SECONDS", help="Give up after so long.")
def predict(
    name: str,
    url: str | None,
    checkpoint_dir: str | None,
    as_json: bool,
    inputs: str,
    version: int | None,
    batch_size: int,
    timeout: float | None,
) -> int:
    """See the help."""

    def perform() -> int:
        from torchord.coordinator.master.answers import as_tensors, in_lists
        from torchord.coordinator.master.master import Master

        settings = settings_of(url, checkpoint_dir)
        run = Master(settings.url, checkpoint_dir=settings.checkpoint_dir).run(name)
        given = as_tensors(_read(inputs))
        found = in_lists(run.predict(given, batch_size=batch_size, version=version, timeout=timeout))
        told(json.dumps(found), {"name": name, "outputs": found}, as_json=as_json)
        return OK

    return guarded(perform)


def _read(inputs: str) -> Any:
    from torchord.coordinator.commands.data import read_arrays

    try:
        if inputs == "-":
            return json.load(sys.stdin)
        if inputs.endswith(".json"):
            return json.loads(Path(inputs).read_text(encoding="utf-8"))
        return read_arrays(Path(inputs))
    except InvalidInput:
        raise
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{inputs!r} cannot be read: {error}") from error
