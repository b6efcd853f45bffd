"""What a forward changes beside buffers: found out, and refused with what to write in its place.

A version holds the parameters and buffers that the model had when it was built. What else a shard's forward
or backward leaves behind is lost with the shard, while a plain loop keeps it: a weight written in the
forward, past autograd or past torch's count of writes (`.data`), a parameter put in another's place, a layer
or buffer made by the first batch. So the first shard that does one of these stops the run.

The module tree, torch's counts of writes and the places of all parameters are compared each time, which
costs microseconds, and so are some elements of some parameters: most writes through `.data` change a whole
tensor. The parameters' bytes are compared on a schedule (`due`), each time where they are few, and each time
once a write was counted: writing the bytes that are there already is no write.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchord.cache.errors import CacheError, InvalidInput
from torchord.cache.tensors.codec import memory
from torchord.cache.tensors.pieces import checksums
from torchord.coordinator.compute.model_state import Mark, marks
from torchord.coordinator.spec.plan import derive_seed

_DENSE = 4  # so many steps at a run's start are looked at whole
_SELDOM = 16  # and one shard of so many later on
_FEW = 16  # so many parameters of a few bytes are compared each time, which costs some ten microseconds
_FEW_BYTES = 2**18

_SAMPLED = 16  # parameters of which elements are compared in a shard, in turn, and
_ELEMENTS = 2  # so many of each
_STRIDE = (
    2654435761  # 2**32 over the golden ratio: the elements of a tensor that follow one another lie far apart
)

_WORDS: Mapping[int, Any] = {1: c_uint8, 2: c_uint16, 4: c_uint32, 8: c_uint64}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

_CONSTRAIN = (
    "constrain or perturb a weight by a parametrization (torch.nn.utils.parametrize) or in the step of an "
    "optimizer of your own, and take first values from data by a batch that the recipe's model function runs "
    "through the model"
)
_MAX_NORM = (
    "make the embedding without max_norm, and bound its rows by a parametrization "
    "(torch.nn.utils.parametrize) or in the step of an optimizer of your own"
)
_BUILD = "make it in the constructor, or by a batch that the recipe's model function runs through the model"
_LATE = (
    ", which was None or not there when the model was built, so that no version of the run holds it; "
    "register it in the constructor with a tensor of its shape (register_buffer)"
)


def due(place: tuple[int, ...]) -> bool:
    """Whether the parameters' bytes are compared around the forward at a place; the same in every process.

    They are in a run's first four steps and in each whose number is a power of two, and at one place in 16
    of all: reading the parameters twice there costs the mean shard 1/8 of one reading.

    Args:
        place: (step, shard), or with local steps (step, shard, local step).
    """
    numbers = (place[0], *place[2:])
    if all(n < _DENSE or n & (n - 1) == 0 for n in numbers):
        return True
    return derive_seed(0, "watch", *place) % _SELDOM == 0


class _Looked(NamedTuple):
    """The model as it was before a forward."""

    marks: list[Mark]
    bytes: dict[str, Any] | None  # name -> digest of a parameter
    elements: list[tuple[str, int, Any, int]]  # name, address of an element, its kind and value
    extra: dict[str, Any]  # path -> extra state of a module


class ForwardWatch:
    """Looks at a model before and after a forward. Made by `Replica`, when the model is as it was built.

    Args:
        model: the module.
        parameters: name -> parameter, all of them.
        frozen: those of them that are not trained: what is written there by counted writes is carried.

    Attributes:
        caches: name -> digest of each buffer that is in no state dict and that a forward gave another layout,
            or made: it stays as it is, like an attribute of the process.
        whole: whether the parameters' bytes are compared each time, be it due or not.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        frozen: Mapping[str, nn.Parameter],
    ) -> None:
        self.caches: dict[str, tuple[Any, ...]] = {}
        self.whole = False
        self._model = model
        self._parameters = parameters
        self._frozen = frozen
        self._modules: list[nn.Module] = []
        self._tree: list[Any] = []
        self._state = _places(model)
        self._known = {id(tensor) for tensor in self._state.values()}
        self._few = _are_few(parameters.values())
        self._extra: dict[str, nn.Module] = {}
        self._looked: _Looked | None = None
        self._forwards = self._turn = 0
        self._sampled = [
            (number, name, parameter.numel(), parameter.dtype.itemsize, _WORDS[parameter.dtype.itemsize])
            for number, (name, parameter) in enumerate(parameters.items())
            if _is_dense(parameter)
        ]
        self._remember()

    def begin(self, *, whole: bool) -> None:
        """Note how the model is, right before a forward.

        Args:
            whole: whether the parameters' bytes are to be compared, see `due`; few are anyway.
        """
        whole = whole or self.whole
        now = marks(self._parameters.values())
        self._looked = _Looked(
            now,
            _digests(self._parameters) if whole or self._few else None,
            [] if whole or self._few else self._elements(now),
            {path: copy.deepcopy(m.get_extra_state()) for path, m in self._extra.items()} if whole else {},
        )

    def end(self, *, again: bool = True) -> None:
        """Compare the model with what `begin` noted.

        Args:
            again: whether the forward can be had once more.

        Raises:
            InvalidInput: the forward changed what no version holds; the message names it and the way out.
            CacheError: it wrote to a parameter, and nobody can tell any more whether the bytes are the same:
                the version has to be loaded and the shard computed anew, which will be looked at whole.
        """
        before, self._looked = self._looked, None
        assert before is not None, "begin comes before end"
        if self._branches() != self._tree:
            self._require_same_state()
            self._remember()
        pairs = zip(self._parameters.items(), before.marks, marks(self._parameters.values()), strict=True)
        moved = [name for (name, _), one, other in pairs if one != other]
        trained = [name for name in moved if name not in self._frozen]
        if trained:
            self.whole = True  # there may be more, of the bytes that are there already
        if before.elements:
            self._require_same_elements(before.elements, moved)
        if before.bytes is not None:
            self._require_same_bytes(before.bytes, moved)
            self._require_same_extra(before.extra)
            self._require_caches()
        elif trained and again:
            raise CacheError(
                f"the forward wrote to parameter {trained[0]!r}, of whatever bytes; the version is loaded "
                "anew and the shard computed once more, watched"
            )

    def seldom(self) -> bool:
        """Whether bytes are to be compared around a forward that no place is known of: one in 16 times."""
        self._forwards += 1
        return self._forwards % 16 == 1

    def tolerate(self, cache: str) -> None:
        """Note that a forward gave another layout to a buffer that is in no state dict."""
        tensor = _places(self._model).get(cache)
        self.caches[cache] = () if tensor is None else _digest_of(tensor)

    # --- structure --------------------------------------------------------------------------------

    def _remember(self) -> None:
        self._modules = list(self._model.modules())
        self._tree = self._branches()
        self._extra = {path: m for path, m in self._model.named_modules() if _has_extra_state(m)}

    def _branches(self) -> list[Any]:
        """Identities of all parameters and modules in the tree, and which buffers there are."""
        found: list[Any] = []
        for module in self._modules:
            found += map(id, module._parameters.values())
            found += map(id, module._modules.values())
            found += [None if buffer is None else True for buffer in module._buffers.values()]
        return found

    def _require_same_state(self) -> None:
        now = _places(self._model)
        for place, tensor in now.items():
            if id(tensor) in self._known:
                continue
            known, what = place in self._state, f"{place!r}{self._owner(place)}"
            if isinstance(tensor, nn.Parameter) and known:
                raise InvalidInput(
                    f"the forward put another parameter in the place of {what}, while the optimizer holds "
                    f"the one before; {_CONSTRAIN}"
                )
            if isinstance(tensor, nn.Parameter):
                raise InvalidInput(
                    f"the forward made the parameter {what}, which no version of the run holds; {_BUILD}"
                )
            if not known and _persistent(self._model, place):
                raise InvalidInput(f"the forward made the buffer {what}{_LATE}")
            if not known:
                self.caches[place] = _digest_of(tensor)
        held = {id(tensor) for tensor in now.values()}
        for name, parameter in self._parameters.items():
            if id(parameter) not in held and id(parameter) in self._known:
                raise InvalidInput(f"the forward took the parameter {name!r} out of the model; {_CONSTRAIN}")

    def _require_caches(self) -> None:
        """Refuse a cache that remembers: of one shape, a cache has one value."""
        now = _places(self._model)
        for place in list(self.caches):
            tensor = now.get(place)
            if tensor is None:
                continue
            before, self.caches[place] = self.caches[place], _digest_of(tensor)
            if before[:-1] == self.caches[place][:-1] and before != self.caches[place]:
                raise InvalidInput(f"each forward changes the buffer {place!r}{self._owner(place)}{_LATE}")

    def _require_same_extra(self, before: Mapping[str, Any]) -> None:
        for path, state in before.items():
            module = self._extra.get(path)
            if module is not None and not _alike(state, module.get_extra_state()):
                raise InvalidInput(
                    f"the forward changed the extra state{self._owner(f'{path}.')}, which no version of the "
                    "run holds; keep what changes in a buffer (register_buffer)"
                )

    # --- bytes --------------------------------------------------------------------------------------

    def _require_same_bytes(self, before: Mapping[str, Any], moved: list[str]) -> None:
        now = _digests(self._parameters)
        for name in self._parameters:
            if before[name] != now[name]:
                self._refuse(name, moved)

    def _elements(self, now: list[Mark]) -> list[tuple[str, int, Any, int]]:
        """An element of each of some parameters, others each time."""
        self._turn += 1
        first = self._turn * _SAMPLED % len(self._sampled) if len(self._sampled) > _SAMPLED else 0
        jump = self._turn * _STRIDE
        found = []
        for number, name, numel, nbytes, kind in (self._sampled * 2)[first : first + _SAMPLED]:
            place = now[number][1] + jump % numel * nbytes
            found.append((name, place, kind, kind.from_address(place).value))
        return found

    def _require_same_elements(self, before: list[tuple[str, int, Any, int]], moved: list[str]) -> None:
        for name, place, kind, value in before:
            # A parameter that was given other memory has none of its elements here any more.
            if name not in moved and kind.from_address(place).value != value:
                self._refuse(name, moved)

    def _refuse(self, name: str, moved: list[str]) -> None:
        """Refuse a write to a parameter, unless it is frozen and the write was counted."""
        where = self._owner(name)
        if name not in self._frozen:
            raise InvalidInput(
                f"the forward wrote to the trained parameter {name!r}{where}, which only the optimizer's "
                f"step may change: here the write would be lost; {self._way_out(self._parameters[name])}"
            )
        if name not in moved:
            raise InvalidInput(
                f"the forward wrote to the frozen parameter {name!r}{where} through .data, where torch "
                "does not count it; write to it under torch.no_grad(), as in "
                "parameter.mul_(m).add_(other, alpha=1 - m), and the run carries it like a buffer"
            )

    def _way_out(self, parameter: Tensor) -> str:
        for module in self._model.modules():
            own = any(parameter is each for each in module._parameters.values())
            if own and getattr(module, "max_norm", None) is not None:
                return _MAX_NORM
        return _CONSTRAIN

    def _owner(self, place: str) -> str:
        """Whose a parameter or buffer is, for a message; "" where its name is not its place in the tree."""
        path = place.rpartition(".")[0]
        module = dict(self._model.named_modules()).get(path)
        return (
            "" if module is None else f" of {repr(path) if path else 'the model'} ({type(module).__name__})"
        )


def _places(model: nn.Module) -> dict[str, Tensor]:
    """Place in the module tree -> parameter or buffer; tied ones at each of theirs."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[prefix + name] = tensor
    return found


def _persistent(model: nn.Module, place: str) -> bool:
    path, _, name = place.rpartition(".")
    return name not in getattr(model.get_submodule(path), "_non_persistent_buffers_set", ())


def _are_few(parameters: Collection[Tensor]) -> bool:
    """Whether parameters are compared in next to no time: a few, of few bytes, on the CPU."""
    return (
        len(parameters) <= _FEW
        and all(parameter.is_cpu for parameter in parameters)
        and sum(parameter.nbytes for parameter in parameters) <= _FEW_BYTES
    )


def _is_dense(parameter: Tensor) -> bool:
    """Whether a parameter has one stretch of this process's memory, of words that can be read."""
    extents = zip(parameter.stride(), parameter.shape, strict=True)
    reach = 1
    for stride, extent in sorted((stride, extent) for stride, extent in extents if extent != 1):
        if stride != reach or not extent:
            return False
        reach *= extent
    return parameter.is_cpu and parameter.numel() > 0 and parameter.dtype.itemsize in _WORDS


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _digests(parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: _digest_of(parameter) for name, parameter in parameters.items()}


def _digest_of(tensor: Tensor) -> tuple[Any, ...]:
    """Shape, dtype and a digest of a tensor's bytes; on a device their sum, which is read when compared."""
    dense = tensor.detach().resolve_conj().resolve_neg()
    if dense.is_cpu:
        return (dense.shape, dense.dtype, checksums([memory(dense.contiguous())]))
    return (dense.shape, dense.dtype, sum_of_bits(dense))


def sum_of_bits(dense: Tensor) -> Tensor:
    """Sum of a tensor's elements as integers of their size: a scalar where it is, not waited for."""
    return dense.reshape(-1).view(_INTEGERS.get(dense.dtype.itemsize, torch.int64)).sum(dtype=torch.int64)


def _alike(one: Any, other: Any) -> bool:
    """Whether two extra states are equal, as far as they can be compared."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return bool(_digest_of(one) == _digest_of(other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    try:
        return bool(one == other)
    except Exception:  # noqa: BLE001  their own comparison; no reason to stop a run
        return True
