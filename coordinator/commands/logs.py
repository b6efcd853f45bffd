"""`torchord logs NAME`: what happened to a run, when, and why it failed."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator, Mapping
from typing import Any

import click

from torchord.cache.ledger.answers import Event
from torchord.coordinator.commands.common import OK, guarded, of_a_run, settings_of

_WIDTH = 80
_BATCH = 500


def in_lines(event: Event) -> Iterator[str]:
    """One event for people, in lines of at most 80 columns: when, and what."""
    from torchord.coordinator.master.progress import worded

    at = time.strftime("%m-%d %H:%M:%S", time.localtime(event.at))
    said = worded(event.type, event.data).splitlines() or [""]
    for place, line in enumerate(said):
        before = f"{at}  " if place == 0 else " " * 16
        yield from textwrap.wrap(
            line, _WIDTH, initial_indent=before, subsequent_indent=" " * 16, break_on_hyphens=False
        ) or [before]


def failure_lines(error: Mapping[str, Any]) -> Iterator[str]:
    """Why a run failed, beyond its event: where it was raised, and the worker's last lines of log."""
    trace, log = str(error.get("traceback") or ""), error.get("log")
    if trace:
        yield "raised at"
        yield from (f"    {line}" for line in trace.splitlines())
    if isinstance(log, list) and log:
        yield f"last lines of the log of {error.get('worker') or 'the worker'}"
        yield from (f"    {line}" for line in log)


def _shown(event: Event, *, as_json: bool) -> None:
    from torchord.cache.ledger.figures import for_others

    if as_json:
        click.echo(for_others({**event.data, "id": event.id, "at": event.at, "type": event.type}))
    else:
        for line in in_lines(event):
            click.echo(line)


@click.command(
    "logs",
    help="What happened to a run, oldest first, and why it failed: where it was raised, and the last lines "
    "that the worker logged before. The server keeps the last 5,000 events.",
)
@of_a_run
@click.option("--follow", "-f", is_flag=True, help="Go on until the run rests.")
@click.option("--steps", is_flag=True, help="Steps, too.")
def logs(
    name: str, url: str | None, checkpoint_dir: str | None, as_json: bool, follow: bool, steps: bool
) -> int:
    """See the help."""

    def perform() -> int:
        from torchord.cache.ledger.figures import for_others
        from torchord.coordinator.master.standing import Standing
        from torchord.coordinator.master.waiting import POLL_SECONDS, RESTING
        from torchord.coordinator.runtime.control_plane import ControlPlane

        run = Standing(ControlPlane(settings_of(url, checkpoint_dir)), name)
        head, after = run.ledger.head(), "0-0"  # raises if there is no such run
        while events := run.ledger.read_events(after, count=_BATCH):
            after = events[-1].id
            for event in events:
                if steps or event.type != "step":
                    _shown(event, as_json=as_json)
        follower = run.follow(after)
        while follow:
            found, events = follower.look(block_seconds=POLL_SECONDS, resting=RESTING)
            for event in events:
                if steps or event.type != "step":
                    _shown(event, as_json=as_json)
            if found is not None and not events and found.status in RESTING:
                break
        head = run.ledger.head()
        if head.status == "failed" and head.error:
            if as_json:
                click.echo(for_others({**head.error, "type": "failure"}))
            else:
                for line in failure_lines(head.error):
                    click.echo(line)
        return OK

    return guarded(perform)
