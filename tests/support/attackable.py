"""A user's module that imports dangerous things, as any module does; recipes must not reach them."""

from __future__ import annotations

import functools
import os
import pickle
from os import system  # noqa: F401

pickled = pickle.loads
hidden = functools.partial(os.system, "true")


def fine() -> str:
    """What a recipe may name."""
    return "fine"
