"""What Flower shows of tasks when it is started for torchord: defaults of its options, and tasks in words."""

from __future__ import annotations

import ast
import re
from typing import Any

_RUN = re.compile(r"(?:(?:^|, )run |'run': ')([A-Za-z0-9][A-Za-z0-9._-]{0,99})(?:'|$)")


def run_of(task: Any) -> str:
    """The run that a task works on, by its arguments as Flower shows them; "" if it is no task of a run."""
    if not str(task.name or "").startswith("torchord."):
        return ""
    found = _RUN.search(str(task.kwargs or ""))
    return found[1] if found else ""


def format_task(task: Any) -> Any:
    """Write arguments and receipt of a task in words; search and API see the originals.

    step 95, shard 2, version 95, run digits-01
    written, loss 0.0467, grad_norm 0.8559, examples 39, nbytes 39,744, ..., worker client1@host/22554

    Tasks of others stay as they are.
    """
    if not str(task.name or "").startswith("torchord."):
        return task
    given = _parsed(task.kwargs)
    receipt = _parsed(task.result)
    if given is not None:
        order = [name for name in given if name not in ("run", "inputs")]
        task.kwargs = _words(given, [*order, "run"])
    if receipt is not None:
        shown = [name for name in receipt if name not in (given or {}) and name not in ("status", "worker")]
        task.result = _words(receipt, ["status", *shown, "worker"])
    return task


OPTIONS: dict[str, Any] = {
    # Whoever reaches Flower can stop workers and read every task: other machines only on demand
    # (--address=0.0.0.0), and then with --basic_auth=user:password.
    "address": "127.0.0.1",
    # What a task worked on, and its receipt, in place of its random id.
    "tasks_columns": "name,kwargs,result,state,runtime,worker,received",
    # A training run makes thousands of tasks; the ledger has the history, this page the present.
    "max_tasks": 20_000,
    # Clients come and go; those that have gone leave the page and the metrics.
    "purge_offline_workers": 60,
    "format_task": format_task,
}
"""Flower's options in torchord's app, as long as nobody gives others: a variable `FLOWER_OPTION`, a
`flowerconfig.py` or the command line."""


def _parsed(text: Any) -> dict[str, Any] | None:
    """The dict of which a task event carries the `repr`; None if it is another thing or was cut off."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _words(values: dict[str, Any], names: list[str]) -> str:
    return ", ".join(_word(name, values[name]) for name in names if name in values)


def _word(name: str, value: Any) -> str:
    if name == "status":
        return str(value)
    if isinstance(value, dict):
        return f"{name} ({_words(value, list(value))})"
    if isinstance(value, float):
        return f"{name} {value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{name} {value:,}"
    return f"{name} {value}"
