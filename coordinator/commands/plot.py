"""`torchord plot NAME [FILE]`: a run's curves in the terminal, or in a file."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from torchord.coordinator.commands.common import OK, guarded, of_a_run, settings_of, told


def read(name: str, url: str | None, checkpoint_dir: str | None, points: int = 400) -> dict[str, object]:
    """A run's curves, as `torchord.coordinator.pages.pages.Pages.curves` has them, read to their end."""
    from torchord.coordinator.pages.pages import Pages

    pages = Pages(settings_of(url, checkpoint_dir))
    while True:
        found = pages.curves(name, points=points)
        if found["loaded"] >= found["version"]:
            return found


@click.command(
    "plot",
    help="A run's curves in the terminal, or in FILE: .svg, or .png where matplotlib is installed.",
)
@of_a_run
@click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--curve",
    "curves",
    multiple=True,
    help="loss, grad_norm, lr, rate, nbytes or a metric; may be given several times (default: loss and "
    "metrics in the terminal, all but nbytes in a file).",
)
def plot(
    name: str,
    url: str | None,
    checkpoint_dir: str | None,
    as_json: bool,
    file: Path | None,
    curves: tuple[str, ...],
) -> int:
    """See the help."""

    def perform() -> int:
        from torchord.coordinator.drawing.characters import characters
        from torchord.coordinator.drawing.picture import picture

        found = read(name, url, checkpoint_dir)
        metrics = found["metrics"]
        assert isinstance(metrics, dict)
        wanted = curves or (() if file else ("loss", *(each for each in metrics if each != "loss")))
        drawn = picture(name, found, wanted)
        if file is not None:
            path = str(drawn.save(file))
            told(f"{name}: the curves are in {path}", {"name": name, "file": path}, as_json=as_json)
        elif as_json:
            told("", {"name": name, "series": found["series"], "metrics": metrics}, as_json=True)
        else:
            plain = not (sys.stdout.encoding or "").lower().startswith("utf")
            for chart in drawn.charts:
                for line in characters(chart, ascii_only=plain):
                    click.echo(line)
        return OK

    return guarded(perform)
