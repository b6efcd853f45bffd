"""`torchord worker` and `torchord flower`: Celery's commands with torchord's app and queues."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

import click

from torchord.coordinator.commands.common import OK, UNREACHABLE, with_url

ROLES = {"all": [], "client": ["-Q", "gradients", "-c", "1"], "server": ["-Q", "updates", "-c", "1"]}
_PASSED = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": ["--help"]}


def _become(words: Sequence[str], url: str | None, *, dry: bool) -> int:
    """Be Celery's command from now on, in this process, so that signals and exit code are its own."""
    if dry:
        click.echo(shlex.join(["celery", *words]))
        return OK
    if url:
        os.environ["TORCHORD_URL"] = url  # not an argument, which everybody on the host can read
    try:
        os.execv(sys.executable, [sys.executable, "-P", "-m", "celery", *words])
    except OSError as error:
        click.echo(f"error: cannot start Celery: {error}", err=True)
        return UNREACHABLE


_DRY = click.option("--show", "dry", is_flag=True, help="Print Celery's command instead of being it.")
_APP = click.option(
    "--app", "-A", default="torchord", show_default=True, help="A Celery app with torchord in it."
)


@click.command(
    "worker",
    context_settings=_PASSED,
    help="Be a worker, as `celery -A torchord worker` is: ROLE is all (default), client (computes) or server "
    "(updates). Whatever else is given is Celery's: see `celery worker --help`.",
)
@click.option("--role", type=click.Choice(list(ROLES)), default="all")
@with_url
@_APP
@_DRY
@click.pass_context
def worker(context: click.Context, role: str, url: str | None, app: str, dry: bool) -> int:
    """See the help."""
    return _become(["-A", app, "worker", *ROLES[role], *context.args], url, dry=dry)


@click.command(
    "flower",
    context_settings=_PASSED,
    help="Show workers, tasks and runs in a browser, as `celery -A torchord flower` does. Whatever else is "
    "given is Flower's: see `celery flower --help`.",
)
@with_url
@_APP
@_DRY
@click.pass_context
def flower(context: click.Context, url: str | None, app: str, dry: bool) -> int:
    """See the help."""
    return _become(["-A", app, "flower", *context.args], url, dry=dry)
