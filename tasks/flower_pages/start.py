"""Registers torchord's pages in Flower when `celery -A APP flower` starts, and in no other command."""

from __future__ import annotations

from typing import Any

import click
from celery import Celery

OPTION = "--runs-allow"


class RunsOption(click.Option):
    """An option of `celery -A APP flower` that Celery takes for every command of the app.

    Click asks each command's options before the command does anything: with that of `flower` the pages are
    there before its web server is made.

    Args:
        whole: the app is torchord's own, so Flower's options have torchord's defaults.
    """

    def __init__(self, *, whole: bool) -> None:
        super().__init__(
            [OPTION],
            metavar="WORDS",
            expose_value=False,
            callback=self._asked,
            help="What the pages about runs may do: on, off, or some of pause, resume, cancel, download "
            "between commas. [default: TORCHORD_FLOWER_ALLOWS, else off]",
        )
        self._whole = whole

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Its line of help, in Flower's alone."""
        return super().get_help_record(ctx) if _is_flower(ctx) else None

    def _asked(self, ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if not _is_flower(ctx):
            return
        from torchord.cache.errors import InvalidInput
        from torchord.cache.settings import flower_allows
        from torchord.tasks.flower_pages.registering import register

        try:
            register(flower_allows(value), whole=self._whole)
        except InvalidInput as error:
            raise click.BadParameter(str(error), ctx, param) from error


def _is_flower(ctx: click.Context) -> bool:
    return ctx.command.name == "flower"


def show_runs(app: Celery, *, whole: bool) -> None:
    """Have `celery -A APP flower` show the runs.

    Args:
        app: whose command line it is.
        whole: the app is torchord's own, so Flower's options have torchord's defaults, too.
    """
    options: set[Any] = app.user_options["preload"]
    if not any(isinstance(option, RunsOption) for option in options):
        options.add(RunsOption(whole=whole))
