"""What `torchord list`, `status` and `watch` show, from the control plane alone: nothing here loads torch."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from torchord.cache.errors import CacheUnreachable, RunNotFound, TorchordError
from torchord.coordinator.master.progress import worded
from torchord.coordinator.master.reports import RunStatus
from torchord.coordinator.master.standing import Standing
from torchord.coordinator.messages.waits import duration
from torchord.coordinator.pages import rows
from torchord.coordinator.runtime.control_plane import ControlPlane

WIDTH = 80
_NAME_SHOWN = 24
__all__ = [
    "WIDTH",
    "fields",
    "figures",
    "first_line",
    "found",
    "in_full",
    "in_lines",
    "listed",
    "progress",
    "worded",
]
_FIGURES = ("loss", "measured", "metrics", "evaluated", "rate", "left_seconds", "workers", "committed_at")


def fields(status: RunStatus) -> dict[str, Any]:
    """A status as JSON has it."""
    waits = [{**asdict(wait), "kind": wait.kind.name.lower()} for wait in status.waits]
    return {**asdict(status), "waits": waits}


def found(plane: ControlPlane, name: str) -> dict[str, Any]:
    """Where a run stands: `RunStatus`, and of its last steps loss, metrics, speed, time left and workers.

    Raises:
        RunNotFound: there is no such run.
    """
    standing = Standing(plane, name)
    status = standing.status()
    ledger = standing.ledger
    head = ledger.head()
    recent = ledger.entries(max(1, head.version - rows.RECENT + 1), head.version)
    row = rows.row(name, head, status, recent, ledger.evaluations())
    return {**fields(status), **{key: row[key] for key in _FIGURES}}


def listed(plane: ControlPlane) -> list[dict[str, Any]]:
    """All runs, oldest first; one whose records are none is `unreadable`."""
    lines = []
    for name in plane.runs.known():
        try:
            lines.append(found(plane, name))
        except RunNotFound:  # it expired meanwhile
            continue
        except CacheUnreachable:
            raise
        except TorchordError as error:  # its records are none; the others' are
            status = RunStatus(name, "unreadable", 0, None, None, str(error), "", 0.0, "")
            lines.append({**fields(status), **dict.fromkeys(_FIGURES)})
    return lines


def in_lines(line: dict[str, Any], width: int) -> Iterator[str]:
    """A run of the list, in lines of at most 80 columns.

    Args:
        width: of the longest name.
    """
    name, room = line["name"], min(width, _NAME_SHOWN)
    shown = name if len(name) <= _NAME_SHOWN else f"{name[: _NAME_SHOWN - 1]}…"
    said = f"{shown:<{room}}  {line['state']:<9}  {progress(line)}"
    for figure in figures(line):
        if len(said) + len(figure) + 2 <= WIDTH:
            said += f", {figure}"
    yield said
    told = first_line(line["error"])
    if not told and line["waits"] and line["state"] != "paused":
        told = f"waits for {line['waits'][0]['what']}"
    if told:
        yield from textwrap.wrap(
            told, WIDTH, initial_indent="    ", subsequent_indent="    ", max_lines=3, placeholder=" …"
        )


def figures(line: dict[str, Any]) -> list[str]:
    """Loss, metric, speed and time left, as far as they are known."""
    said = []
    if line["loss"] is not None:
        said.append(f"loss {line['loss']:.4g}")
    if line["left_seconds"] is not None:
        said.append(f"{duration(line['left_seconds'])} left")
    if line["rate"] is not None:
        said.append(f"{line['rate']:,.0f} examples/s")
    metrics = {name: value for name, value in (line["metrics"] or {}).items() if name != "loss"}
    said += [f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, int | float)]
    return said


def in_full(line: dict[str, Any], now: float) -> Iterator[str]:
    """What `status` says of a run beside what it waits for.

    Args:
        now: Unix time (s).
    """
    yield f"{line['name']}: {line['state']}, {progress(line)}"
    rest = line["state"] in rows.ENDED
    if line["epoch"] is not None and line["state"] != "done":
        yield f"  epoch        {line['epoch'] + 1}"
    if line["loss"] is not None:
        measured = "".join(f", {name} {value:.6g}" for name, value in line["measured"].items())
        yield f"  loss         {line['loss']:.6g}{measured} (the last step's)"
    if line["metrics"]:
        said = ", ".join(f"{name} {value:.6g}" for name, value in sorted(line["metrics"].items()))
        yield f"  evaluation   {said} (version {line['evaluated']})"
    if line["rate"] is not None:
        yield f"  speed        {line['rate']:,.0f} examples/s on {_counted(line['workers'], 'worker')}"
    if line["left_seconds"] is not None:
        yield f"  left         {duration(line['left_seconds'])}"
    yield f"  submitted    {_ago(line['submitted_at'], now)}"
    if line["committed_at"]:
        yield f"  last commit  {_ago(line['committed_at'], now)}"
    if not rest or line["server"]:
        yield f"  server       {line['server'] or 'none'}"
    if line["reason"]:
        yield f"  ended        {line['reason']}"
    if line["error"]:
        yield f"  error        {line['error']}"
        for frame in line["traceback"].splitlines():
            yield f"               {frame}"


def progress(line: dict[str, Any]) -> str:
    """How far a run is."""
    total = "?" if line["total_steps"] is None else line["total_steps"]
    return f"step {line['version']} of {total}"


def first_line(error: str | None) -> str:
    """The first line of an error, "" if there is none."""
    return error.splitlines()[0] if error else ""


def _ago(at: float, now: float) -> str:
    return f"{duration(max(0.0, now - at))} ago"


def _counted(count: int | None, what: str) -> str:
    return f"{count or 0} {what}{'' if count == 1 else 's'}"
