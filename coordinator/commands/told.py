"""`torchord told NAME`: what of a run others have not been told."""

from __future__ import annotations

from dataclasses import asdict

import click

from torchord.coordinator.commands.common import BAD, OK, guarded, of_a_run, settings_of


@click.command(
    "told",
    help="What of a run others (submit's `on`) have not been told yet, or could not be; with --again, what "
    "was given up is tried anew. Exit code 1 if something was given up.",
)
@of_a_run
@click.option("--again", is_flag=True, help="Have tried anew what was given up.")
def told(name: str, url: str | None, checkpoint_dir: str | None, as_json: bool, again: bool) -> int:
    """See the help."""

    def perform() -> int:
        from torchord.cache.ledger.figures import for_others
        from torchord.coordinator.master.standing import untold
        from torchord.coordinator.runtime.control_plane import ControlPlane

        ledger = ControlPlane(settings_of(url, checkpoint_dir)).ledger(name)
        ledger.head()  # raises if there is no such run
        revived = ledger.tell_again() if again else 0
        left = ledger.outbox()
        if as_json:
            value = {"name": name, "revived": revived, "untold": [asdict(each) for each in left]}
            click.echo(for_others(value))
        else:
            if again:
                click.echo(f"{name}: {revived} to be tried anew")
            for each in left:
                click.echo(f"{name}: {untold(each) or f'{each.event} ({each.id}), not yet'}")
            if not left:
                click.echo(f"{name}: nothing is left to be told")
        return BAD if any(each.dead for each in left) else OK

    return guarded(perform)
