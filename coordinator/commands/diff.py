"""`torchord diff A B`: the first step, shard and tensor in which two runs differ."""

from __future__ import annotations

import textwrap
from dataclasses import asdict

import click

from torchord.coordinator.commands.common import (
    BAD,
    OK,
    find_modules_here,
    guarded,
    run_names,
    told,
    with_checkpoints,
    with_json,
    with_url,
)

_WIDTH = 80
_SETTINGS_SHOWN = 20


@click.command(
    "diff",
    help="The first step, shard and tensor in which two runs differ, and in what their recipes and configs "
    "do. For the tensor the shard is computed again, with the recipes' modules from the directory that this "
    "is started in. Exit code 1 if they differ.",
)
@click.argument("one", shell_complete=run_names)
@click.argument("other", shell_complete=run_names)
@with_url
@with_checkpoints
@with_json
@click.option("--quick", is_flag=True, help="Compute nothing: step and shard alone.")
def diff(
    one: str, other: str, url: str | None, checkpoint_dir: str | None, as_json: bool, quick: bool
) -> int:
    """See the help."""

    def perform() -> int:
        from torchord.coordinator.master.differing import differ
        from torchord.coordinator.master.master import Master
        from torchord.coordinator.pages.comparing import differences

        find_modules_here()
        master = Master(url, checkpoint_dir=checkpoint_dir)
        runs = master.run(one), master.run(other)
        found = differ(*runs, compute=not quick)
        settings = differences([run._spec() for run in runs])
        said = [f"{one} and {other}: {'no difference' if found.same else 'they differ'}", *found.said]
        lines = [line for text in said for line in textwrap.wrap(text, _WIDTH, subsequent_indent="  ")]
        for setting in settings[:_SETTINGS_SHOWN]:
            text = f"{setting['name']}: {' and '.join(map(str, setting['values']))}"
            lines += textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="      ")
        told("\n".join(lines), {**asdict(found), "settings": settings}, as_json=as_json)
        return OK if found.same else BAD

    return guarded(perform)
