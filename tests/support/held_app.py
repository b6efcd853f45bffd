"""torchord's app, for workers that start no sooner than a test lets them.

A test holds the file named by HELD_BY with an exclusive `flock`. Once it lets go, a worker starts, or ends
with the text that is in the file by then.
"""

from __future__ import annotations

import fcntl
import os
from importlib import import_module
from pathlib import Path

with Path(os.environ["HELD_BY"]).open() as _gate:
    fcntl.flock(_gate, fcntl.LOCK_SH)
    if _word := _gate.read():
        raise SystemExit(_word)

app = import_module("torchord.tasks").app
