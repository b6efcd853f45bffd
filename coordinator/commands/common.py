"""What the commands of `torchord` share: exit codes, options, and one line for whatever goes wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import click

from torchord.cache.errors import CacheUnreachable, InvalidInput, RunNotFound, TorchordError
from torchord.cache.settings import Settings, from_environment, located

OK, BAD, USAGE, NOT_FOUND, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 4, 130
_COMPLETION_SECONDS = 1.0

Command = TypeVar("Command", bound=Callable[..., Any])


def settings_of(url: str | None, checkpoint_dir: str | None = None) -> Settings:
    """What was typed, then the environment, then defaults.

    Raises:
        InvalidInput: a variable of the environment cannot be used.
    """
    settings = from_environment()
    place = located(checkpoint_dir) if checkpoint_dir else settings.checkpoint_dir
    return replace(settings, url=url or settings.url, checkpoint_dir=place)


def guarded(perform: Callable[[], int]) -> int:
    """Do it; what it raises is one line on stderr, and an exit code."""
    try:
        return perform()
    except TorchordError as error:
        click.echo(f"error: {error}", err=True)
        codes = ((RunNotFound, NOT_FOUND), (CacheUnreachable, UNREACHABLE), (InvalidInput, USAGE))
        return next((code for kind, code in codes if isinstance(error, kind)), BAD)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output (`| head`) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def find_modules_here() -> None:
    """Let recipes' modules be found where this is started, as workers find them where they are."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing there hides an installed module


def told(said: str, value: Any, *, as_json: bool) -> None:
    """Print a sentence, or the value that it tells of as JSON."""
    from torchord.cache.ledger.figures import for_others

    click.echo(for_others(value) if as_json else said)


def run_names(context: click.Context, parameter: click.Parameter, typed: str) -> list[str]:
    """Names of runs that begin with what was typed; none if the server does not answer."""
    from torchord.cache.ledger.runs import Runs
    from torchord.cache.servers.redis_client import connect

    try:
        url = context.params.get("url") or from_environment().url
        with connect(url, patience_seconds=_COMPLETION_SECONDS) as client:
            names = Runs(client, url).listed()
    except TorchordError:
        return []
    return [name for name in names if name.startswith(typed)]


# --- options ------------------------------------------------------------------------------


def with_url(command: Command) -> Command:
    """`--url`."""
    text = "Redis URL of broker and control plane (default: TORCHORD_URL, then localhost)."
    return click.option("--url", metavar="URL", help=text)(command)


def with_checkpoints(command: Command) -> Command:
    """`--checkpoint-dir`."""
    text = "Where the checkpoints are (default: TORCHORD_CHECKPOINT_DIR)."
    return click.option("--checkpoint-dir", metavar="DIR", help=text)(command)


def with_json(command: Command) -> Command:
    """`--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def of_a_run(command: Command) -> Command:
    """NAME, `--url`, `--checkpoint-dir` and `--json`."""
    named = click.argument("name", shell_complete=run_names)
    return named(with_url(with_checkpoints(with_json(command))))
