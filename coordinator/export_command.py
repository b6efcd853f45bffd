"""`torchord export NAME FILE`: a run's newest weights as a safetensors file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from torchord.cache.errors import CacheUnreachable, RunNotFound, TorchordError

OK, BAD, NOT_FOUND, UNREACHABLE = 0, 1, 3, 4


@click.command(
    "export",
    help="Write a run's newest weights as a safetensors file, averaged where the run averages. Needs none of "
    "the recipe's modules.",
)
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--url", metavar="URL", help="Redis URL of broker and control plane (else TORCHORD_URL).")
@click.option("--checkpoint-dir", help="Where the checkpoints are (default: TORCHORD_CHECKPOINT_DIR).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def export(name: str, file: Path, url: str | None, checkpoint_dir: str | None, as_json: bool) -> int:
    """See the help."""
    from safetensors import SafetensorError

    from torchord.cache.ledger.figures import for_others
    from torchord.cache.settings import from_environment, located
    from torchord.coordinator.pages.pages import Pages

    try:
        settings = from_environment()
        place = located(checkpoint_dir) if checkpoint_dir else settings.checkpoint_dir
        settings = replace(settings, url=url or settings.url, checkpoint_dir=place)
        version = Pages(settings).write_weights(name, str(file))
    except (OSError, SafetensorError) as error:
        click.echo(f"error: cannot write {file}: {error}; choose a directory that exists", err=True)
        return BAD
    except TorchordError as error:
        click.echo(f"error: {error}", err=True)
        codes = ((RunNotFound, NOT_FOUND), (CacheUnreachable, UNREACHABLE))
        return next((code for kind, code in codes if isinstance(error, kind)), BAD)
    said = f"{name}: the weights of version {version} are in {file}"
    click.echo(for_others({"name": name, "version": version, "file": str(file)}) if as_json else said)
    return OK
