"""Writes the events of all runs as TensorBoard summaries: `python -m torchord.coordinator.tensorboard
--logdir DIR`.

A follower like any other: it reads the event streams, computes nothing, and may be started, stopped
and started again at any time. It remembers where it was in `DIR/RUN/torchord.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchord.cache.errors import RunNotFound, TorchordError
from torchord.cache.ledger.answers import Event
from torchord.coordinator.master.master import Master

_POLL_SECONDS = 1.0
_PLACE = "torchord.json"


class Follower:
    """Copies one run's events to TensorBoard.

    Args:
        master: where the runs are.
        run: the run's name.
        directory: the run's own log directory.
        writer: an object with `add_scalar(tag, value, step, walltime)` and `flush()`.
    """

    def __init__(self, master: Master, run: str, directory: Path, writer: Any) -> None:
        self.run = run
        self.writer = writer
        self._ledger = master._services.ledger(run)
        self._place = directory / _PLACE
        self._after = json.loads(self._place.read_text())["after"] if self._place.exists() else "0-0"

    def copy(self) -> int:
        """Write what is new; returns how many events that was."""
        events = self._ledger.read_events(self._after)
        for event in events:
            for tag, value, step in scalars(event):
                self.writer.add_scalar(tag, value, step, int(event.id.split("-")[0]) / 1000)
            self._after = event.id
        if events:
            self.writer.flush()
            self._place.write_text(json.dumps({"after": self._after}))
        return len(events)


def scalars(event: Event) -> list[tuple[str, float, int]]:
    """(tag, value, global step) of each number that an event carries."""
    data = event.data
    if event.type == "step":
        step = int(data["version"])
        found = [("train/loss", data["loss"], step), ("train/gradient norm", data["grad_norm"], step)]
        found += [(f"train/learning rate {group}", lr, step) for group, lr in enumerate(data["lr"])]
        found.append(("speed/gradient bytes a step", data["nbytes"], step))
        if data["seconds"] > 0:
            found.append(("speed/samples a second", data["examples"] / data["seconds"], step))
        return found
    if event.type == "evaluation":
        return [
            (f"evaluation/{name}", value, int(data["version"])) for name, value in data["metrics"].items()
        ]
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    """Follow every run until interrupted; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m torchord.coordinator.tensorboard", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--logdir", type=Path, required=True, help="directory for TensorBoard's event files")
    parser.add_argument("--url", default=None, help="Redis URL; default TORCHORD_URL")
    parser.add_argument("--once", action="store_true", help="copy what is there and exit")
    options = parser.parse_args(arguments)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("TensorBoard is not installed; run: pip install 'torchord[tensorboard]'", file=sys.stderr)
        return 2
    followers: dict[str, Follower] = {}
    try:
        options.logdir.mkdir(parents=True, exist_ok=True)
        master = Master(options.url)
        while True:
            for run in master.runs():
                if run not in followers:
                    directory = options.logdir / run
                    directory.mkdir(parents=True, exist_ok=True)
                    writer: Any = SummaryWriter(str(directory))
                    followers[run] = Follower(master, run, directory, writer)
            (options.logdir / ".alive").touch()
            copied = sum(follower.copy() for follower in followers.values())
            if options.once and not copied:
                return 0
            if not copied:
                time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        return 130
    except RunNotFound as error:
        print(error, file=sys.stderr)
        return 1
    except TorchordError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        for follower in followers.values():
            follower.writer.close()


if __name__ == "__main__":
    sys.exit(main())
