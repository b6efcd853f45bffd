"""`torchord submit FILE`: a run as a TOML file has it."""

from __future__ import annotations

from pathlib import Path

import click

from torchord.cache.errors import CacheUnreachable, InvalidInput, TorchordError
from torchord.coordinator.commands.common import BAD, OK, UNREACHABLE, USAGE, find_modules_here
from torchord.coordinator.spec.submission import read


@click.command(
    "submit",
    help="Submit a run as a TOML file has it: name, [recipe], [config]; modules are found from the "
    "directory that this is started in, as workers find them in theirs.",
)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--name", help="Name of the run, in place of the file's.")
@click.option("--url", metavar="URL", help="Redis URL of broker and control plane (else TORCHORD_URL).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def submit(file: Path, name: str | None, url: str | None, as_json: bool) -> int:
    """See the help."""
    from torchord.cache.ledger.figures import for_others
    from torchord.coordinator.master.master import Master

    find_modules_here()
    try:
        said = read(file.read_text(encoding="utf-8"))
        run = Master(url).submit(said.recipe, said.config, name=name or said.name, **said.options())
        state = run.status().state
    except InvalidInput as error:
        click.echo(f"error: {file}: {error}", err=True)
        return USAGE
    except (TorchordError, UnicodeDecodeError) as error:
        click.echo(f"error: {file}: {error}", err=True)
        return UNREACHABLE if isinstance(error, CacheUnreachable) else BAD
    if as_json:
        click.echo(for_others({"name": run.name, "state": state}))
    else:
        click.echo(f"{run.name}: {state}; `torchord watch {run.name}` follows it")
    return OK
