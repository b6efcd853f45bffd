"""The metrics that torchord has, and the text in which Prometheus reads them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


@dataclass(frozen=True, slots=True)
class Family:
    """One metric.

    Attributes:
        name: without its labels.
        kind: whether it may fall.
        text: what it is, with its unit.
        labels: their names, in order.
    """

    name: str
    kind: Literal["counter", "gauge"]
    text: str
    labels: tuple[str, ...] = ()


def _gauge(name: str, text: str, *labels: str) -> Family:
    return Family(f"torchord_{name}", "gauge", text, labels)


def _counter(name: str, text: str, *labels: str) -> Family:
    return Family(f"torchord_{name}", "counter", text, labels)


UP = _gauge("up", "1 if the store answered this scrape, else 0: then nothing else is told")
SECONDS = _gauge("scrape_seconds", "Seconds that this scrape took")
WORKERS = _gauge("workers", "Living worker processes that serve a role's queue", "role")
BUSY = _gauge("workers_busy", "Those of them that are at a task", "role")
DEAF = _gauge("workers_deaf", "Living workers that take no messages")
DISTRUSTED = _gauge("workers_distrusted", "Nodes that lied and get no shard of a run that checks")
SUPERVISOR = _gauge("supervisor", "1 if a supervisor is elected, else 0")
QUEUE = _gauge("queue_length", "Messages that wait in a queue", "queue")
SET_ASIDE = _gauge("messages_set_aside", "Entries of queues that were no messages, till none came for a week")
MEMORY = _gauge("store_memory_bytes", "Bytes that the store of the control plane holds")
LIMIT = _gauge("store_memory_limit_bytes", "Bytes that it may hold; 0 for as many as there are")
LOOKUPS = _counter("cache_lookups_total", "Look-ups in a tier of the model cache, by all", "tier", "found")
BYTES = _counter("cache_bytes_total", "Bytes that a tier gave (read) or took (written)", "tier", "way")
RUNS = _gauge("runs", "Runs in a state, of those that are told of", "state")

STATE = _gauge("run_state", "1 for the state that a run is in", "run", "state")
STEPS = _gauge("run_steps", "Committed global steps; falls when a run is rolled back", "run")
PLANNED = _gauge("run_steps_planned", "Global steps of the whole run, once they are known", "run")
LOSS = _gauge("run_loss", "Loss of the last committed step", "run")
NORM = _gauge("run_gradient_norm", "L2 norm of the last step's gradient, before clipping", "run")
RATE = _gauge("run_examples_per_second", "Examples a second in the last steps", "run")
STEP = _gauge(
    "run_step_seconds",
    "Seconds of a step, a mean over the last: whole, compute (its slowest shard), other (queues, update)",
    "run",
    "part",
)
LAG = _gauge("run_lag_seconds", "Seconds since the last commit or the submission, while it runs", "run")
EXAMPLES = _counter("run_examples_total", "Examples in the committed steps that this process has seen", "run")
GRADIENTS = _counter("run_gradient_bytes_total", "Bytes of gradients in those steps", "run")
RETRIES = _counter("run_retries_total", "Shards of those steps that were begun anew, counted by tries", "run")
RECOVERIES = _counter(
    "run_recoveries_total", "Those steps that another server or another try of a shard had to finish", "run"
)
RECOVERY = _counter("run_recovery_seconds_total", "Seconds of those steps, from the commit before", "run")
DUPLICATES = _counter("run_duplicates_total", "Deliveries of shards that were ignored as duplicates", "run")
LATE = _counter("run_late_total", "Those that came after their step", "run")
DIVERGENT = _counter("run_divergent_total", "Duplicates whose bytes were others", "run")
BACKUPS = _counter("run_backups_total", "Shards that were sent to an idle worker, too", "run")
REPLAYED = _counter("run_replayed_total", "Steps that were computed again after a server's death", "run")
REFUSING = _gauge("run_refusing_workers", "Living workers that may not work on a run", "run")
HINDERED = _gauge("run_hindered", "1 while the run's next move fails and is tried again", "run")
UNTOLD = _gauge("run_untold", "What others have not been told: waiting, or dead (given up)", "run", "state")

FAMILIES: tuple[Family, ...] = tuple(found for found in list(vars().values()) if isinstance(found, Family))
"""All of them, in the order in which they are told."""


class Samples:
    """What one scrape tells: each family's samples."""

    def __init__(self) -> None:
        self._found: dict[str, list[tuple[tuple[str, ...], float]]] = {}

    def add(self, family: Family, value: float, *labels: str) -> None:
        """One sample, with a value for each of the family's labels."""
        if len(labels) != len(family.labels):
            raise ValueError(f"{family.name} has labels {family.labels}, not {labels}")
        self._found.setdefault(family.name, []).append((labels, value))

    def take(self, others: Samples) -> None:
        """All samples of `others`, too."""
        for name, found in others._found.items():
            self._found.setdefault(name, []).extend(found)

    def values(self) -> list[dict[str, Any]]:
        """All samples as JSON-able values: name, labels and value of each."""
        return [
            {
                "name": family.name,
                "labels": dict(zip(family.labels, labels, strict=True)),
                "value": float(value),
            }
            for family in FAMILIES
            for labels, value in self._found.get(family.name, ())
        ]

    def text(self) -> str:
        """All samples in the text format of Prometheus, version 0.0.4."""
        return "".join(f"{line}\n" for family in FAMILIES for line in self._lines(family))

    def _lines(self, family: Family) -> Iterator[str]:
        samples = self._found.get(family.name)
        if not samples:
            return
        yield f"# HELP {family.name} {family.text}"
        yield f"# TYPE {family.name} {family.kind}"
        for labels, value in samples:
            pairs = ",".join(
                f'{name}="{label.translate(_ESCAPES)}"'
                for name, label in zip(family.labels, labels, strict=True)
            )
            yield f"{family.name}{f'{{{pairs}}}' if pairs else ''} {_figure(value)}"


def _figure(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))
