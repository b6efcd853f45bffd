"""Random numbers that an example draws alike, whatever batch it is in.

A batch's loss and those of its parts cannot be compared where a forward is random: the parts draw other
numbers. Within `AlignedChance.drawn` each random operation of torch is computed example by example, each
with a seed made from that of the operation and the example's number. So an example has the same dropout
mask, noise or time step in the batch and in any part of it, and the losses can be compared like those of a
model without chance.

Which dimension of an operation's result has the examples is found out by two forwards: the one that grows
with their number. An operation whose result has one size for every batch (noise on a weight, one figure for
the batch) draws the same in all of them. What else there is (a row for each token of all examples, numbers of
numpy) stays as it is, and whoever compares finds that out by another order of the examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchord.coordinator.spec.plan import derive_seed

_Shape = tuple[int, ...]


class AlignedChance:
    """The random operations of one forward, by their place in it.

    A forward of all examples and one of some tell where they have the examples; then comes `settle`.

    Attributes:
        whole: whether no forward so far drew anything by another shape than that of all examples, but for
            their number: an example of a batch that is padded to another length draws other numbers.
    """

    def __init__(self) -> None:
        self.whole = True
        self._seen: list[tuple[int, list[_Shape]]] = []
        self._dims: list[int | None] = []

    def settle(self) -> None:
        """Find out from the two forwards that were drawn where operations have the examples."""
        (examples, whole), (fewer, part) = self._seen
        if len(whole) == len(part):
            pairs = zip(whole, part, strict=True)
            self._dims = [_grown(one, other, examples, fewer) for one, other in pairs]

    @contextmanager
    def drawn(self, examples: Sequence[int]) -> Iterator[None]:
        """Within the block, a forward of these examples draws what they draw in any batch (see `settle`)."""
        with _Drawing(examples, self._dims) as drawing:
            yield
        if len(self._seen) < 2:
            self._seen.append((len(examples), drawing.shapes))
        else:
            self.whole = self.whole and self._fits(len(examples), drawing.shapes)

    def _fits(self, examples: int, shapes: list[_Shape]) -> bool:
        count, whole = self._seen[0]
        expected = [
            shape if dim is None else (*shape[:dim], shape[dim] // count * examples, *shape[dim + 1 :])
            for shape, dim in zip(whole, self._dims, strict=False)
        ]
        return shapes[: len(whole)] == expected


def _grown(whole: _Shape, part: _Shape, examples: int, fewer: int) -> int | None:
    """The dimension whose size goes with the number of examples; None if there is none."""
    if len(whole) != len(part):
        return None
    pairs = enumerate(zip(whole, part, strict=True))
    return next((dim for dim, (one, other) in pairs if one and one * fewer == other * examples), None)


class _Drawing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes random operations example by example.

    An operation's seed is drawn from the generator that it would have used: code that puts a generator back,
    as activation checkpointing does for its second forward, draws the same once more.

    Attributes:
        shapes: of the operations' results, in their order.
    """

    def __init__(self, examples: Sequence[int], dims: Sequence[int | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[_Shape] = []
        self._examples = examples
        self._dims = dims
        self._places: dict[tuple[int, Any, _Shape], int | None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        generator = next((each for each in _all(args, kwargs) if isinstance(each, torch.Generator)), None)
        shape, names = _shape_of(func, args, kwargs), _sized(func, args, kwargs)
        with _kept(generator, _seeding(args, kwargs)) as (seed, put):
            dim = self._dim(seed, func, shape) if names else None
            if dim is None:
                put(derive_seed(seed, "operation"))
                return func(*args, **kwargs)
            size = shape[dim] // len(self._examples)
            results = []
            for place, example in enumerate(self._examples):
                put(derive_seed(seed, "operation", example))
                results.append(_of_rows(func, args, kwargs, names, dim, place * size, size))
        return _joined(func, args, kwargs, results, dim)

    def _dim(self, seed: int, func: Any, shape: _Shape) -> int | None:
        key = (seed, func, shape)
        if key not in self._places:
            place = len(self.shapes)
            self.shapes.append(shape)
            found = self._dims[place] if place < len(self._dims) else None
            fits = found is not None and found < len(shape) and shape[found] % len(self._examples) == 0
            self._places[key] = found if fits else None
        return self._places[key]


@contextmanager
def _kept(
    generator: torch.Generator | None, put: Callable[[int], object]
) -> Iterator[tuple[int, Callable[[int], object]]]:
    """A seed from a generator, and what seeds it; afterwards that one seed is all that it gave."""
    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    if generator is not None:
        state = generator.get_state()
        try:
            yield seed, generator.manual_seed
        finally:
            generator.set_state(state)
        return
    state = torch.get_rng_state()
    try:
        yield seed, put
    finally:
        torch.set_rng_state(state)


def _seeding(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[int], object]:
    """What seeds the process's generator for an operation: on the CPU the one, which takes a microsecond."""
    devices = [each.device for each in _all(args, kwargs) if isinstance(each, Tensor)]
    devices += [each for each in _all(args, kwargs) if isinstance(each, torch.device)]
    here = all(device.type == "cpu" for device in devices)
    return torch.default_generator.manual_seed if here else torch.manual_seed


def _all(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    yield from args
    yield from kwargs.values()


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _shape_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Shape:
    """The shape that all tensors of an operation have, or the one it is asked for; () if there is none."""
    given = _arguments(func, args, kwargs)
    if "size" in given:
        return tuple(given["size"])
    shapes = {tuple(value.shape) for value in given.values() if isinstance(value, Tensor) and value.dim()}
    return shapes.pop() if len(shapes) == 1 else ()


def _sized(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
    """Names of the arguments that have a row for each example; none where rows cannot be drawn apart."""
    if func._schema.name.startswith(
        "aten::_scaled_dot_product"
    ):  # keys of one example are values of another's
        return set()
    given = _arguments(func, args, kwargs)
    if "size" in given:
        return {"size"}
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.dim()}
    return set(tensors) if _shape_of(func, args, kwargs) else set()


def _of_rows(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: set[str],
    dim: int,
    start: int,
    size: int,
) -> Any:
    """An operation's result for some rows; where it writes to an argument, it writes to these rows of it."""

    def part(name: str, value: Any) -> Any:
        if name not in names:
            return value
        if isinstance(value, Tensor):
            return value.narrow(dim, start, size)
        return [*value[:dim], size, *value[dim + 1 :]]

    order = [argument.name for argument in func._schema.arguments]
    sliced = [part(name, value) for name, value in zip(order, args, strict=False)]
    return func(*sliced, **{name: part(name, value) for name, value in kwargs.items()})


def _joined(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Any], dim: int) -> Any:
    """The whole result from its rows'."""
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if written:
        return _arguments(func, args, kwargs)[written[0]]
    if isinstance(results[0], tuple):
        return tuple(torch.cat(each, dim) for each in zip(*results, strict=True))
    return torch.cat(results, dim)
