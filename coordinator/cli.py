"""Operations on runs from a shell: `torchord list|status|watch|pause|resume|cancel|verify`.

Exit codes: 0 all is well; 1 the run or its audit is not (verify found a discrepancy, watch saw the
run fail, the run cannot do that in its state); 2 wrong arguments; 3 no such run; 4 Redis does not
answer. Every message is one that a person can act on; with --json, results go to stdout as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from torchord.cache.errors import CacheUnreachable, InvalidInput, RunNotFound, TorchordError
from torchord.cache.servers.address import masked
from torchord.coordinator.master.master import Master
from torchord.coordinator.messages.task_names import worker_command

OK, BAD, USAGE, NOT_FOUND, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 4, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; None takes the process's.

    Returns:
        The exit code, see the module.
    """
    options = _parser().parse_args(arguments)
    try:
        master = Master(options.url, checkpoint_dir=options.checkpoint_dir)
        command: Callable[[Master, argparse.Namespace], int] = options.command
        return command(master, options)
    except RunNotFound as error:
        return _report(error, NOT_FOUND)
    except CacheUnreachable as error:
        return _report(error, UNREACHABLE)
    except InvalidInput as error:
        return _report(error, USAGE)
    except TorchordError as error:
        return _report(error, BAD)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output (`| head`) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--url", help="Redis URL of broker and control plane (default: TORCHORD_URL, then localhost)"
    )
    common.add_argument(
        "--checkpoint-dir", help="where the checkpoints are (default: TORCHORD_CHECKPOINT_DIR)"
    )
    common.add_argument("--json", action="store_true", help="print JSON")
    parser = argparse.ArgumentParser(
        prog="torchord",
        description="Look at, stop, continue and audit torchord's runs.",
        epilog="Exit codes: 0 all is well; 1 the run or its audit is not; 2 wrong arguments; "
        "3 no such run; 4 Redis does not answer.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, function, text in (
        ("list", _list, "all runs, oldest first"),
        ("status", _status, "where a run stands"),
        ("watch", _watch, "follow a run's events until it rests"),
        ("pause", _pause, "stop within the step; what is done is kept"),
        ("resume", _resume, "continue after a pause, a failure, or the loss of Redis"),
        ("cancel", _cancel, "end a run for good"),
        ("verify", _verify, "audit a run's ledger"),
    ):
        command = commands.add_parser(
            name, parents=[common], help=text, description=f"{text[0].upper()}{text[1:]}."
        )
        command.set_defaults(command=function)
        if name != "list":
            command.add_argument("name", metavar="NAME", help="the run")
        if name == "resume":
            command.add_argument(
                "--admit-skew",
                action="store_true",
                help="let workers with another torch, hardware or code take part; the bits are then theirs",
            )
        if name == "verify":
            command.add_argument(
                "--replay",
                metavar="STEP",
                type=int,
                action="append",
                default=[],
                help="also compute this step again here, from the nearest checkpoint, and compare bytes; "
                "may be given several times",
            )
    return parser


# --- commands -----------------------------------------------------------------------------


def _list(master: Master, options: argparse.Namespace) -> int:
    rows = []
    for name in master.runs():
        try:
            rows.append(asdict(master.run(name).status()))
        except RunNotFound:  # it expired meanwhile
            continue
    if options.json:
        print(json.dumps(rows))
        return OK
    if not rows:
        print(f"No runs at {masked(master.url)}.")
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['state']:<9}  {_progress(row)}{_first_line(row['error'])}")
    return OK


def _status(master: Master, options: argparse.Namespace) -> int:
    status = asdict(master.run(options.name).status())
    if options.json:
        print(json.dumps(status))
        return OK
    print(f"{status['name']}: {status['state']}, {_progress(status)}")
    if status["epoch"] is not None and status["state"] != "done":
        print(f"  epoch        {status['epoch'] + 1}")
    print(f"  server       {status['server'] or 'none'}")
    if status["error"]:
        print(f"  error        {status['error']}")
        for line in status["traceback"].splitlines():
            print(f"               {line}")
    for queue in status["waiting_for"]:
        print(f"  waiting for  a worker on queue {queue!r}: {worker_command(queue)}")
    for refusal in status["refused"]:
        print(f"  refused      {refusal}")
    for said in status["discarded"]:
        print(f"  lost         {said}")
    return OK


def _watch(master: Master, options: argparse.Namespace) -> int:
    run = master.run(options.name)
    run.status()  # raises if there is no such run
    for event in run.events():
        if options.json:
            line = json.dumps({"id": event.id, "type": event.type, **event.data})
        else:
            line = _worded(event.type, event.data)
        print(line, flush=True)
    status = run.status()
    if status.state == "done":
        return OK
    if not options.json:
        print(f"{status.name} is {status.state}{_first_line(status.error)}", file=sys.stderr)
    return BAD


def _pause(master: Master, options: argparse.Namespace) -> int:
    master.run(options.name).pause()
    return _told(master, options)


def _resume(master: Master, options: argparse.Namespace) -> int:
    master.run(options.name).resume(admit_skew=options.admit_skew)
    return _told(master, options)


def _cancel(master: Master, options: argparse.Namespace) -> int:
    master.run(options.name).cancel()
    return _told(master, options)


def _verify(master: Master, options: argparse.Namespace) -> int:
    def progress(step: int) -> None:
        print(f"computing step {step} again", file=sys.stderr, flush=True)

    found = master.run(options.name).verify(
        reexecute=options.replay, progress=progress if options.replay else None
    )
    if options.json:
        print(json.dumps(asdict(found)))
    else:
        print(found)
        for problem in found.problems[1:20]:
            print(f"  also: {problem}")
        if len(found.problems) > 20:
            print(f"  and {len(found.problems) - 20} more (--json shows all)")
    return OK if found.ok else BAD


# --- words --------------------------------------------------------------------------------


def _told(master: Master, options: argparse.Namespace) -> int:
    status = asdict(master.run(options.name).status())
    print(json.dumps(status) if options.json else f"{status['name']}: {status['state']}, {_progress(status)}")
    return OK


def _progress(status: dict[str, Any]) -> str:
    total = "?" if status["total_steps"] is None else status["total_steps"]
    return f"step {status['version']} of {total}"


def _first_line(error: str | None) -> str:
    return f": {error.splitlines()[0]}" if error else ""


def _worded(kind: str, data: dict[str, Any]) -> str:
    if kind == "step":
        return (
            f"step {data['step']}: loss {data['loss']:.6g}, {data['examples']} examples in "
            f"{data['seconds']:.2f} s"
        )
    return f"{kind}: {', '.join(_pairs(data))}" if data else kind


def _pairs(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _pairs(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name} {value:.6g}" if isinstance(value, float) else f"{prefix}{name} {value}"


def _report(error: TorchordError, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
