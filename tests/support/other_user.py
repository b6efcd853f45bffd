"""What another user of this host can do, tried by a forked child that has become that user."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest

NOBODY = 65534
only_root_becomes_another = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user"
)


def as_another_user(attempt: Callable[[], Any]) -> Any:
    """Run a function as the user "nobody", and return what it returns (JSON).

    An OSError that it raises is returned as the name of its class.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: the child uses none
        child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            try:
                found = attempt()
            except OSError as error:
                found = type(error).__name__
            os.write(writer, json.dumps(found).encode())
            os._exit(0)
        except BaseException:  # noqa: BLE001  a fork must not return into pytest
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the attempt itself failed"
    return json.loads(said)
