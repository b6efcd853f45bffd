"""What torch imports for a process's first optimizer, imported before a round needs it.

That is torch's compiler, which each optimizer asks whether it is compiled: a second, and some 75 MB. A Client
that takes part in no rounds has no optimizer and never imports it.
"""

from __future__ import annotations

import importlib
import sys
import threading

_MODULE = "torch._dynamo"
_lock = threading.Lock()
_begun = False


def begin() -> None:
    """Import it in the background, once a process; a round that comes meanwhile waits for the rest of it.

    To be called once the recipe has been imported: two threads that import what imports one another may
    each find half of it.
    """
    global _begun
    with _lock:
        begun, _begun = _begun, True
    if not begun and _MODULE not in sys.modules:
        load = threading.Thread(target=importlib.import_module, args=(_MODULE,), name="torchord-imports")
        load.daemon = True
        load.start()
