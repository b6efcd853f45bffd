"""torch's default dtype, which a run has as float32: who sets another is told, and nothing computes under it.

A plain loop in a program that sets it has weights of that dtype, and a run would have others in silence.
Nothing here imports torch: in a program without it the default is float32.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from torchord.cache.errors import InvalidInput, RecipeError

_setting: dict[str, str] = {}  # module -> the default dtype that importing it set


def require_float32(what: str) -> None:
    """Refuse another default dtype.

    Args:
        what: what set it, for the message.

    Raises:
        InvalidInput: it is not float32.
    """
    found = _present()
    if found is not None and str(found) != "torch.float32":
        raise InvalidInput(_said(what, found))


def imported(name: str) -> ModuleType:
    """Import a module; the default dtype is afterwards what it was.

    Raises:
        RecipeError: importing it sets another one, now or when it was first imported.
    """
    before = _present()
    loaded = importlib.import_module(name)
    if (after := _present()) is not None and str(after) != str(before or "torch.float32"):
        _setting[name] = str(after)
        torch: Any = sys.modules["torch"]
        torch.set_default_dtype(torch.float32 if before is None else before)
    if name in _setting:
        raise RecipeError(_said(f"importing module {name!r}", _setting[name]))
    return loaded


def _present() -> Any:
    torch: Any = sys.modules.get("torch")
    return None if torch is None else torch.get_default_dtype()


def _said(what: str, dtype: Any) -> str:
    return (
        f"{what} sets torch's default dtype to {dtype}, but a run computes under float32, so that its "
        "weights would be of another dtype than yours; give the dtype where tensors are made (dtype=..., or "
        "model.double() in the model function)"
    )
