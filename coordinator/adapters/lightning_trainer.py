"""What a LightningModule finds as `self.trainer` and `batch_idx`: what a shard knows, the rest by a
refusal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torchord.cache.errors import InvalidInput

_ALIKE: dict[str, Any] = {
    "logger": None,
    "loggers": [],
    "callbacks": [],
    "barebones": False,
    "sanity_checking": False,
    "global_rank": 0,
    "local_rank": 0,
    "node_rank": 0,
    "world_size": 1,
    "num_devices": 1,
    "num_nodes": 1,
    "is_global_zero": True,
    "accumulate_grad_batches": 1,
}
"""What each shard may take for granted: it computes as one process alone, and nobody logs."""


class TrainerFacts:
    """Stands where Lightning's Trainer would.

    Args:
        module: the module's class, for messages.
        given: what the recipe says of the trainer besides.
    """

    def __init__(self, module: str, given: Mapping[str, Any]) -> None:
        self._module = module
        self._given = {**_ALIKE, **given}
        self._doing = ""

    def within(self, doing: str, *, training: bool) -> TrainerFacts:
        """The same inside of one of the module's methods."""
        found = TrainerFacts(self._module, self._given | {"training": training, "validating": not training})
        found._doing = doing
        return found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_given" not in self.__dict__:  # copying asks for what is not there
            raise AttributeError(name)
        if name in self._given:
            return self._given[name]
        raise InvalidInput(
            f"{self._doing} of {self._module} reads self.trainer.{name}, which a shard does not know: it "
            "may be computed at any time and anywhere; bind the value as an argument of the module, or "
            f"give it by torchord.lightning(..., trainer={{{name!r}: ...}})"
        )


class _Unknown:
    """A number that nobody has: it may be handed on, and not be used."""

    def _used(self, *others: Any) -> NoReturn:
        raise InvalidInput(
            "a step of a LightningModule uses batch_idx, which a shard has not: it is a part of a batch; "
            "leave it out, or compute from the batch itself"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __floordiv__ = __truediv__ = (
        _used
    )
    __lt__ = __le__ = __gt__ = __ge__ = __int__ = __index__ = __float__ = __bool__ = _used
    __str__ = __format__ = _used

    def __eq__(self, other: object) -> bool:
        self._used()

    def __ne__(self, other: object) -> bool:
        self._used()

    __hash__ = None  # type: ignore[assignment]


UNKNOWN: Any = _Unknown()
"""The `batch_idx` of every step."""
