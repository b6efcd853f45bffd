"""The command `torchord`: its table of commands, and those that act on a run (docs/cli.md).

Exit codes: 0 all is well; 1 the run or its audit is not (verify found a discrepancy, watch saw the
run fail, the run cannot do that in its state); 2 wrong arguments; 3 no such run; 4 Redis does not
answer. Every message is one that a person can act on; with --json, results go to stdout as JSON.
"""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchord.cache.errors import CacheUnreachable
from torchord.cache.ledger.figures import for_others
from torchord.cache.servers.address import masked
from torchord.cache.settings import from_environment
from torchord.coordinator.commands.celery_aliases import flower, worker
from torchord.coordinator.commands.common import (
    BAD,
    INTERRUPTED,
    OK,
    USAGE,
    guarded,
    run_names,
    settings_of,
)
from torchord.coordinator.commands.completion import completion
from torchord.coordinator.commands.data import data
from torchord.coordinator.commands.demo import demo
from torchord.coordinator.commands.diff import diff
from torchord.coordinator.commands.export import export
from torchord.coordinator.commands.logs import logs
from torchord.coordinator.commands.metrics import metrics
from torchord.coordinator.commands.plot import plot
from torchord.coordinator.commands.predict import predict
from torchord.coordinator.commands.report import report
from torchord.coordinator.commands.submit import submit
from torchord.coordinator.commands.token import token
from torchord.coordinator.commands.told import told
from torchord.coordinator.doctor import doctor
from torchord.coordinator.key_commands import keys
from torchord.coordinator.trust_commands import liars, readmit

if TYPE_CHECKING:
    from torchord.cache.ledger.answers import Event
    from torchord.coordinator.commands.screen import Screen
    from torchord.coordinator.master.master import Master
    from torchord.coordinator.runtime.control_plane import ControlPlane


@dataclass(frozen=True)
class Options:
    """What was typed.

    Attributes:
        name: of the run, or of the node for `health`; "" for `list`.
        url: Redis URL of broker and control plane; None: the environment's.
        checkpoint_dir: where the checkpoints are; None: the environment's.
        json: whether results are printed as JSON.
        admit_skew: `resume --admit-skew`.
        admit_code: `resume --admit-code`.
        replay: steps of `verify --replay`.
        live: `health --live`.
        statement, model: files of `verify --statement --model`.
    """

    name: str = ""
    url: str | None = None
    checkpoint_dir: str | None = None
    json: bool = False
    admit_skew: bool = False
    admit_code: bool = False
    replay: tuple[int, ...] = ()
    live: bool = False
    statement: Path | None = None
    model: Path | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; None takes the process's.

    Returns:
        The exit code, see the module.
    """
    try:
        code: int = _torchord.main(arguments, prog_name="torchord", standalone_mode=False)
        return code
    except click.ClickException as error:
        error.show()
        return USAGE
    except click.Abort:
        return INTERRUPTED


def _perform(command: Callable[[Master, Options], int], options: Options) -> int:
    from torchord.coordinator.master.master import Master  # imports torch: help and completion do without

    return guarded(lambda: command(Master(options.url, checkpoint_dir=options.checkpoint_dir), options))


def _look(command: Callable[[ControlPlane, Options], int], options: Options) -> int:
    """Run a command that needs the control plane alone, and so no torch."""
    from torchord.coordinator.runtime.control_plane import ControlPlane

    return guarded(lambda: command(ControlPlane(settings_of(options.url, options.checkpoint_dir)), options))


# --- what can be typed ----------------------------------------------------------------------

_URL = click.Option(
    ["--url"], help="Redis URL of broker and control plane (default: TORCHORD_URL, then localhost)."
)
_CHECKPOINTS = click.Option(
    ["--checkpoint-dir"], help="Where the checkpoints are (default: TORCHORD_CHECKPOINT_DIR)."
)
_JSON = click.Option(["--json"], is_flag=True, help="Print JSON.")
_ADMIT_SKEW = click.Option(
    ["--admit-skew"],
    is_flag=True,
    help="Let workers with another torch, hardware or code take part; the bits are then theirs.",
)
_ADMIT_CODE = click.Option(
    ["--admit-code"],
    is_flag=True,
    help="Take the recipe's sources as they are here for the run's from now on; the run records it.",
)
_REPLAY = click.Option(
    ["--replay"],
    metavar="STEP",
    type=int,
    multiple=True,
    help="Also compute this step again here, from the nearest checkpoint, and compare bytes; "
    "may be given several times.",
)
_LIVE = click.Option(
    ["--live"],
    is_flag=True,
    help="For whoever restarts what is not alive: that Redis is away is no fault of the worker's.",
)


_STATEMENT = click.Option(
    ["--statement"],
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Check the seal of a finished run's statement, with the keys of TORCHORD_KEYS; needs no Redis.",
)
_MODEL = click.Option(
    ["--model"],
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="With --statement: also that the weights of this safetensors file are the ones that it names.",
)


def _command(
    name: str,
    perform: Callable[[Master, Options], int] | None,
    text: str,
    *more: click.Option,
    look: Callable[[ControlPlane, Options], int] | None = None,
) -> None:
    """Add a command to the group.

    Args:
        perform: what it does with a Master.
        look: what it does with the control plane alone, instead.
    """
    parameters: list[click.Parameter] = [_URL, _CHECKPOINTS, _JSON, *more]
    if name != "list":
        alone = name == "verify"  # a statement names its run
        parameters.append(click.Argument(["name"], required=not alone, default="", shell_complete=run_names))

    def run(**typed: Any) -> int:
        if typed.get("statement") is not None:
            return guarded(lambda: _verify_statement(Options(**typed)))
        if name != "list" and not typed["name"]:
            raise click.UsageError("name a run, or a --statement")
        if look is not None:
            return _look(look, Options(**typed))
        assert perform is not None
        return _perform(perform, Options(**typed))

    _torchord.add_command(click.Command(name, params=parameters, callback=run, help=text))


_torchord = click.Group(
    "torchord",
    help="Look at, stop, continue and audit torchord's runs.",
    epilog="Exit codes: 0 all is well; 1 the run or its audit is not; 2 wrong arguments; "
    "3 no such run; 4 Redis does not answer.",
)


# --- commands -----------------------------------------------------------------------------


def _health(options: Options) -> int:
    """Whether a worker lives; without importing torch."""
    import socket

    from torchord.cache.ledger.quarantine import in_words, quarantined
    from torchord.cache.ledger.workers import Registry
    from torchord.cache.servers.redis_client import connect

    url = options.url or from_environment().url
    try:
        with connect(url) as client:
            registry = Registry(client, url)
            alive, barred = registry.alive().values(), registry.distrusted()
            aside = quarantined(client, url)
    except CacheUnreachable as error:
        if not options.live:
            raise
        print(f"nothing is known of the worker, and that is no fault of its own: {error}", file=sys.stderr)
        return OK
    node, here = options.name, socket.gethostname()
    ours = [info for info in alive if (info.node == node if node else info.host == here)]
    deaf = [info for info in ours if info.deaf]
    if options.json:
        print(for_others([{**asdict(info), "quarantined": aside} for info in ours]))
    else:
        for info in ours:
            said = f", has taken no messages for {info.silent:.0f} s" if info in deaf else ""
            print(f"{info.id}: {info.task or 'idle'}{said}")
            if info.node in barred:
                print(f"  {barred[info.node].said()}")
        if not ours:
            print(f"no worker of {f'node {node}' if node else f'host {here}'} lives", file=sys.stderr)
        if aside:
            print(in_words(aside))
    return OK if ours and not deaf else BAD


def _list(plane: ControlPlane, options: Options) -> int:
    from torchord.coordinator import views

    found = views.listed(plane)
    if options.json:
        print(for_others(found))
        return OK
    if not found:
        print(f"No runs at {masked(plane.settings.url)}.")
    width = max((len(line["name"]) for line in found), default=0)
    for line in found:
        for text in views.in_lines(line, width):
            print(text)
    return OK


def _status(plane: ControlPlane, options: Options) -> int:
    from torchord.coordinator import views
    from torchord.coordinator.messages.waits import duration

    found = views.found(plane, options.name)
    if options.json:
        print(for_others(found))
        return OK
    now = time.time()
    for text in views.in_full(found, now):
        print(text)
    for wait in found["waits"]:
        since = duration(max(0.0, now - wait["since"]))
        print(f"  waits for {wait['what']}, since {since}; {wait['ends']}")
    for refusal in found["refused"]:
        print(f"  refused      {refusal}")
    for telling in found["untold"]:
        print(f"  not told     {telling}")
    return OK


def _watch(plane: ControlPlane, options: Options) -> int:
    from torchord.coordinator import views
    from torchord.coordinator.master.standing import Standing
    from torchord.coordinator.master.waiting import POLL_SECONDS, RESTING

    run = Standing(plane, options.name)
    run.status()  # raises if there is no such run
    with _shown(options) as shown:
        follower, quiet = run.follow(), run.quiet(shown)
        while True:
            head, events = follower.look(block_seconds=POLL_SECONDS, resting=RESTING)
            for event in events:
                shown.event(event, views.worded(event.type, event.data))
            if head is not None and not events and head.status in RESTING:
                break
            quiet.look(head, moved=bool(events))
    status = run.status()
    if status.state == "done":
        return OK
    if not options.json:
        told = views.first_line(status.error)
        print(f"{status.name} is {status.state}{': ' if told else ''}{told}", file=sys.stderr)
    return BAD


def _shown(options: Options) -> Screen | _Lines:
    """A curve and the last events on a terminal, else a line for each."""
    if options.json or not sys.stdout.isatty():
        return _Lines(options)
    from rich.console import Console

    from torchord.coordinator.commands.screen import Screen

    console = Console()
    return _Lines(options) if console.is_dumb_terminal else Screen(console, options.name)


class _Lines(nullcontext[Any]):
    """Says on lines of their own what happens in a run, and what it waits for."""

    def __init__(self, options: Options) -> None:
        super().__init__(self)
        self._options = options

    def event(self, event: Event, worded: str) -> None:
        """See `torchord.coordinator.commands.screen.Screen`."""
        value = {"id": event.id, "type": event.type, **event.data}
        print(for_others(value) if self._options.json else worded, flush=True)

    def quiet(self, said: str) -> None:
        """What was said stays there to read."""

    def say(self, said: str) -> None:
        """See `torchord.coordinator.master.waiting.Shown`."""
        print(for_others({"type": "waiting", "message": said}) if self._options.json else said, flush=True)


def _pause(master: Master, options: Options) -> int:
    master.run(options.name).pause()
    return _told(master, options)


def _resume(master: Master, options: Options) -> int:
    master.run(options.name).resume(admit_skew=options.admit_skew, admit_code=options.admit_code)
    return _told(master, options)


def _cancel(master: Master, options: Options) -> int:
    master.run(options.name).cancel()
    return _told(master, options)


def _verify(master: Master, options: Options) -> int:
    def progress(step: int) -> None:
        print(f"computing step {step} again", file=sys.stderr, flush=True)

    found = master.run(options.name).verify(
        reexecute=options.replay, progress=progress if options.replay else None
    )
    if options.json:
        print(for_others(asdict(found)))
    else:
        _print_wrapped(str(found))
        for problem in found.problems[1:20]:
            _print_wrapped(f"  also: {problem}")
        if len(found.problems) > 20:
            print(f"  and {len(found.problems) - 20} more (--json shows all)")
    return OK if found.ok else BAD


def _print_wrapped(said: str) -> None:
    indent = " " * (2 + len(said) - len(said.lstrip()))
    print(textwrap.fill(said, 80, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False))


def _verify_statement(options: Options) -> int:
    """Check a statement of a run that is done."""
    from torchord.cache.keyring import keyring
    from torchord.coordinator.runtime.statement import checked

    settings = from_environment()
    assert options.statement is not None
    said = checked(options.statement, keyring(settings.keys, options.url or settings.url), options.model)
    if options.json:
        print(for_others(said))
    else:
        print(f"the seal holds: run {said['run']}, {said['version']} steps, chain {said['chain']}")
        like = "" if options.model is None else ", as in the file"
        print(f"  weights      sha256 {said['weights_sha256']}{like}")
    return OK


def _statement(master: Master, options: Options) -> int:
    text = master.run(options.name).statement()
    if text is None:
        print(f"{options.name} has no statement: it is not done, or there are no keys", file=sys.stderr)
        return BAD
    print(text)
    return OK


# --- words --------------------------------------------------------------------------------


def _told(master: Master, options: Options) -> int:
    from torchord.coordinator import views

    status = views.fields(master.run(options.name).status())
    said = f"{status['name']}: {status['state']}, {views.progress(status)}"
    print(for_others(status) if options.json else said)
    return OK


_torchord.add_command(
    click.Command(
        "health",
        params=[
            _URL,
            _JSON,
            _LIVE,
            click.Argument(["name"], metavar="[NODE]", required=False, default=""),
        ],
        callback=lambda **typed: guarded(lambda: _health(Options(**typed))),
        help="Whether the workers of this host live and take messages, or those of a node (NAME@HOST): "
        "for health checks. Exit code 0 if all do, 1 if none lives or one is deaf, 4 if Redis does not "
        "answer (0 with --live).",
    )
)
_command("list", None, "All runs, oldest first.", look=_list)
_command("status", None, "Where a run stands.", look=_status)
_command("watch", None, "Follow a run's events until it rests.", look=_watch)
_command("pause", _pause, "Stop within the step; what is done is kept.")
_command(
    "resume",
    _resume,
    "Continue after a pause, a failure, or the loss of Redis.",
    _ADMIT_SKEW,
    _ADMIT_CODE,
)
_command("cancel", _cancel, "End a run for good.")
_command("verify", _verify, "Audit a run's ledger, or check a statement.", _REPLAY, _STATEMENT, _MODEL)
_command("statement", _statement, "Print the sealed statement of a run that is done.")
for command in (
    submit,
    logs,
    plot,
    report,
    export,
    predict,
    data,
    diff,
    demo,
    told,
    metrics,
    keys,
    liars,
    readmit,
    doctor,
    worker,
    flower,
    completion,
    token,
):
    _torchord.add_command(command)
