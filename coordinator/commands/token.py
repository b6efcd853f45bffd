"""`torchord token NAME`: a token for a program that uses the REST interface."""

from __future__ import annotations

import click

from torchord.coordinator.commands.common import OK, guarded, told, with_json
from torchord.coordinator.pages.tokens import SCOPES, made


@click.command(
    "token",
    help="Make a token for a program that uses the REST interface, called NAME in the log. It is shown once; "
    "the server gets the entry, which does not give it away, in TORCHORD_API_TOKENS or its file.",
)
@click.argument("name")
@click.option(
    "--scope",
    type=click.Choice(SCOPES),
    default=SCOPES[0],
    show_default=True,
    help="write: submit, pause, resume and cancel, too.",
)
@with_json
def token(name: str, scope: str, as_json: bool) -> int:
    """See the help."""

    def perform() -> int:
        secret, entry = made(name, scope)
        told(f"token  {secret}\nentry\n{entry}", {"token": secret, "entry": entry}, as_json=as_json)
        return OK

    return guarded(perform)
