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

from torchord.cache.errors import CacheUnreachable, RunNotFound, TorchordError
from torchord.cache.settings import located
from torchord.coordinator.master.master import Master
from torchord.coordinator.master.run import Run
from torchord.coordinator.runtime.happenings import scalars

_POLL_SECONDS = 1.0
_PLACE = "torchord.json"


class Summaries:
    """Copies one run's events to TensorBoard.

    Args:
        run: the run.
        directory: the run's own log directory.
        writer: an object with `add_scalar(tag, value, step, walltime)` and `flush()`.
    """

    def __init__(self, run: Run, directory: Path, writer: Any) -> None:
        self.writer = writer
        self._place = directory / _PLACE
        self._follower = run.follow(
            json.loads(self._place.read_text())["after"] if self._place.exists() else "0-0"
        )

    def copy(self) -> int:
        """Write what is new; returns how many events that was: none while Redis is away.

        Raises:
            CacheUnreachable: Redis was away for too long, or from the start.
            RunNotFound: the run has expired, or was lost and nobody created it again.
        """
        _, events = self._follower.look(block_seconds=0.0, resting=())
        for event in events:
            for tag, value, step in scalars(event):
                self.writer.add_scalar(tag, value, step, int(event.id.split("-")[0]) / 1000)
        if events:
            self.writer.flush()
            self._place.write_text(json.dumps({"after": events[-1].id}))
        return len(events)


def copy_all(followed: dict[str, Summaries]) -> int:
    """Write what is new of every run; a run that is gone is followed no more. Returns how many events."""
    copied = 0
    for name in list(followed):
        try:
            copied += followed[name].copy()
        except RunNotFound:  # `main` takes it up again, should somebody create it
            followed.pop(name).writer.close()
    return copied


def _names(master: Master, followed: dict[str, Summaries]) -> list[str]:
    """The runs that are not followed yet; none while Redis is away."""
    try:
        return [name for name in master.runs() if name not in followed]
    except CacheUnreachable:
        if not followed:
            raise
        return []  # those that are followed say when that takes too long


def main(arguments: Sequence[str] | None = None) -> int:
    """Follow every run until interrupted; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m torchord.coordinator.tensorboard", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--logdir", type=Path, required=True, help="directory for TensorBoard's event files")
    parser.add_argument("--url", default=None, help="Redis URL; default TORCHORD_URL")
    parser.add_argument("--once", action="store_true", help="copy what is there and exit")
    options = parser.parse_args(arguments)
    options.logdir = Path(located(options.logdir))
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("TensorBoard is not installed; run: pip install 'torchord[tensorboard]'", file=sys.stderr)
        return 2
    followed: dict[str, Summaries] = {}
    try:
        options.logdir.mkdir(parents=True, exist_ok=True)
        master = Master(options.url)
        while True:
            for name in _names(master, followed):
                directory = options.logdir / name
                directory.mkdir(parents=True, exist_ok=True)
                followed[name] = Summaries(master.run(name), directory, SummaryWriter(str(directory)))
            (options.logdir / ".alive").touch()
            copied = copy_all(followed)
            if options.once and not copied:
                return 0
            if not copied:
                time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        return 130
    except TorchordError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        for summaries in followed.values():
            summaries.writer.close()


if __name__ == "__main__":
    sys.exit(main())
