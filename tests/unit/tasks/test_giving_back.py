"""What a process does at its end with messages that it holds, while the broker is away."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from torchord.tasks.transport import QoS


class Channel:
    """A channel whose broker is away."""

    do_restore = True
    connection_errors = (ConnectionError,)

    @contextmanager
    def conn_or_acquire(self, client: Any) -> Iterator[Any]:
        raise ConnectionError("the broker is away")
        yield


def held(messages: int) -> QoS:
    qos = QoS(Channel())  # type: ignore[no-untyped-call]
    for number in range(messages):
        qos._delivered[str(number)] = object()
    return qos


def test_no_pickle_of_messages_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        held(3).restore_unacked_once()
    assert list(tmp_path.iterdir()) == []
    (line,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.getMessage() == "3 messages could not be given back to the broker: the broker is away"
