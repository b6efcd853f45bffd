"""`torchord export NAME FILE`: a run's newest weights, or its model as a program."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import click

from torchord.cache.errors import InvalidInput
from torchord.coordinator.commands.common import (
    BAD,
    OK,
    find_modules_here,
    guarded,
    of_a_run,
    settings_of,
    told,
)

FORMATS = ("safetensors", "torch-export", "onnx")


@click.command(
    "export",
    help="Write a run's newest weights as a safetensors file, averaged where the run averages, without the "
    "recipe's modules. Or its model as a program that needs no code of yours, by torch.export (.pt2) or as "
    "ONNX (where onnx and onnxscript are installed): for that the recipe's modules and dataset must be here.",
)
@of_a_run
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--format", "kind", type=click.Choice(FORMATS), default=FORMATS[0], show_default=True)
def export(
    name: str, url: str | None, checkpoint_dir: str | None, as_json: bool, file: Path, kind: str
) -> int:
    """See the help."""

    def perform() -> int:
        from safetensors import SafetensorError

        settings = settings_of(url, checkpoint_dir)
        if not file.absolute().parent.is_dir():
            click.echo(f"error: cannot write {file}: choose a directory that exists", err=True)
            return BAD
        try:
            if kind == "safetensors":
                from torchord.coordinator.pages.pages import Pages

                version = Pages(settings).write_weights(name, str(file))
            else:
                lacking = [
                    each for each in ("onnx", "onnxscript") if kind == "onnx" and find_spec(each) is None
                ]
                if lacking:
                    raise InvalidInput(
                        f"ONNX needs {' and '.join(lacking)}, which this machine lacks; install it, or take "
                        "--format torch-export"
                    )
                find_modules_here()
                from torchord.coordinator.master.exporting import write_program
                from torchord.coordinator.master.master import Master

                master = Master(settings.url, checkpoint_dir=settings.checkpoint_dir)
                version = write_program(master.run(name), file, kind)
        except (OSError, SafetensorError) as error:
            click.echo(f"error: cannot write {file}: {error}; choose a directory that exists", err=True)
            return BAD
        what = "weights" if kind == "safetensors" else "model"
        value = {"name": name, "version": version, "file": str(file), "format": kind}
        told(
            f"{name}: the {what} of version {version} {'are' if what == 'weights' else 'is'} in {file}",
            value,
            as_json=as_json,
        )
        return OK

    return guarded(perform)
