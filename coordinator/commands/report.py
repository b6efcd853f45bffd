"""`torchord report NAME [FILE]`: all that is known of a run in one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from torchord.cache.errors import RunNotFound
from torchord.coordinator.commands.common import BAD, OK, guarded, of_a_run, settings_of, told

_POINTS = 800


@click.command(
    "report",
    help="Write all that is known of a run as one HTML file (default: NAME.html): curves, evaluations, "
    "timeline, events, audit, recipe and config. It needs no network and no script.",
)
@of_a_run
@click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False))
def report(name: str, url: str | None, checkpoint_dir: str | None, as_json: bool, file: Path | None) -> int:
    """See the help."""

    def perform() -> int:
        path = file or Path(f"{name}.html")
        try:
            written(name, url, checkpoint_dir, path)
        except OSError as error:
            click.echo(f"error: cannot write {path}: {error}; choose a directory that exists", err=True)
            return BAD
        told(f"{name}: the report is in {path}", {"name": name, "file": str(path)}, as_json=as_json)
        return OK

    return guarded(perform)


def written(name: str, url: str | None, checkpoint_dir: str | None, path: Path) -> None:
    """Write the report of a run.

    Raises:
        RunNotFound: there is no such run.
        OSError: the file cannot be written.
    """
    from torchord.coordinator.commands.report_page import page
    from torchord.coordinator.pages.pages import Pages

    pages = Pages(settings_of(url, checkpoint_dir))
    while True:
        curves = pages.curves(name, points=_POINTS)
        if curves["loaded"] >= curves["version"]:
            break
    try:
        audit: dict[str, Any] | None = pages.audit(name)
    except RunNotFound:  # it is on disk, and Redis knows it no more
        audit = None
    path.write_text(
        page(pages.overview(name), curves, pages.timeline(name, first=1), audit), encoding="utf-8"
    )
