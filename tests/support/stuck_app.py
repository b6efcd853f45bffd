"""torchord's app, for workers that can be made deaf, and that give up what is stuck within a second or two.

SIGUSR2 makes the loop that takes messages stand still for ever; everything else of the process goes on.
"""

from __future__ import annotations

import signal
import threading
from importlib import import_module
from typing import Any

from torchord.cache.ledger import heartbeat, workers
from torchord.tasks import renewal

workers.DEAF_SECONDS = 1.5
heartbeat.LONG_SECONDS = 0.5
renewal.ABANDONED_SECONDS = 1.0
renewal._LOOK_SECONDS = 0.2


def _deaf(*_: Any) -> None:
    threading.Event().wait()


signal.signal(signal.SIGUSR2, _deaf)

app = import_module("torchord.tasks").app
