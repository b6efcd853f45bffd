"""`torchord completion SHELL`: the line that makes a shell complete commands, options and names of runs."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from torchord.coordinator.commands.common import OK, told, with_json

SHELLS = {
    "bash": 'eval "$(torchord completion bash)"   # into ~/.bashrc',
    "zsh": 'eval "$(torchord completion zsh)"   # into ~/.zshrc',
    "fish": "torchord completion fish > ~/.config/fish/completions/torchord.fish",
}


@click.command(
    "completion",
    help="Print what makes a shell complete commands, options and names of runs. For bash: "
    'eval "$(torchord completion bash)" in ~/.bashrc.',
)
@click.argument("shell", type=click.Choice(list(SHELLS)))
@with_json
@click.pass_context
def completion(context: click.Context, shell: str, as_json: bool) -> int:
    """See the help."""
    kind = get_completion_class(shell)
    assert kind is not None
    source = kind(context.find_root().command, {}, "torchord", "_TORCHORD_COMPLETE").source_vars()
    script = kind.source_template % source
    told(script, {"shell": shell, "install": SHELLS[shell], "script": script}, as_json=as_json)
    return OK
