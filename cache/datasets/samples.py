"""Samples <-> columns of bytes: what a sample looks like, and how its values lie in a stream.

A sample is a nest of dicts, tuples and lists around values; its *skeleton* is that nest as JSON,
with a number in the place of each value. Values of one place make a *column*: a stream of their
bytes and, where their lengths differ, two more with the end and the shape of each. Nothing here
reads or writes anything, and nothing is ever executed to read a column.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchord.cache.datasets.content import Bytes, Stream
from torchord.cache.errors import DatasetDamaged, InvalidInput, TorchordError
from torchord.cache.reading import FOREIGN, parsed
from torchord.cache.tensors.codec import MOST_DIMENSIONS, dtype_name, dtype_of, memory

_PLAIN = {"int": ("<q", "int64"), "float": ("<d", "float64"), "bool": ("<?", "bool")}
_TEXT = ("str", "bytes")
_NESTS: dict[str, type] = {"tuple": tuple, "list": list, "dict": dict}
_KINDS = ("tensor", "array", "scalar", *_PLAIN, *_TEXT)
_MOST_DTYPE = 40  # signs
_NUMPY_KINDS = "biufcmMSU"  # numbers, dates and fixed-length strings; no objects, no records


@dataclass(frozen=True, slots=True)
class Leaf:
    """One place in a sample.

    Attributes:
        path: where, as in "[0]['image']"; "" if the sample is the value.
        kind: "tensor", "array" (numpy), "scalar" (numpy), "int", "float", "bool", "str" or "bytes".
        dtype: name of the torch dtype, or numpy's spelling ("<f4"); "" for str and bytes.
    """

    path: str
    kind: str
    dtype: str

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        if self.kind == "tensor":
            return dtype_of(self.dtype).itemsize
        return np.dtype(self.dtype).itemsize if self.dtype else 1


@dataclass(frozen=True, slots=True)
class Value:
    """One value as bytes.

    Attributes:
        data: its elements in C order.
        shape: extent of each dimension; () for a scalar, (length,) for str and bytes.
    """

    data: memoryview | bytes
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Column:
    """The values of one place.

    Attributes:
        leaf: the place.
        shape: of every value; None if they differ.
        data: the values' bytes, one behind the other.
        ends: where each value ends in `data`, int64, shape (samples,); None if shape is given.
        shapes: the shape of each value, int64, shape (samples, most dimensions), filled with -1;
            None if `shape` is given, and for str and bytes.
    """

    leaf: Leaf
    shape: tuple[int, ...] | None
    data: Stream
    ends: Stream | None = None
    shapes: Stream | None = None

    @property
    def value_nbytes(self) -> int:
        """Bytes of each value, if they are all of one shape."""
        assert self.shape is not None
        return math.prod(self.shape) * self.leaf.itemsize

    def streams(self) -> Iterator[Stream]:
        """The streams that there are."""
        return (stream for stream in (self.data, self.ends, self.shapes) if stream is not None)


@dataclass(frozen=True, slots=True)
class DatasetManifest:
    """A stored dataset in full.

    Attributes:
        samples: how many.
        skeleton: of each sample, see `take_apart`.
        columns: one for each number in the skeleton.
    """

    samples: int
    skeleton: Any
    columns: tuple[Column, ...]

    def to_json(self) -> bytes:
        """Return JSON text that is the same for equal manifests."""
        columns = [
            {
                "path": c.leaf.path,
                "kind": c.leaf.kind,
                "dtype": c.leaf.dtype,
                "shape": None if c.shape is None else list(c.shape),
                "data": c.data.to_json(),
                "ends": None if c.ends is None else c.ends.to_json(),
                "shapes": None if c.shapes is None else c.shapes.to_json(),
            }
            for c in self.columns
        ]
        value = {"samples": self.samples, "skeleton": self.skeleton, "columns": columns}
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes) -> DatasetManifest:
        """Rebuild a manifest that `to_json` produced, trusting nothing in it.

        Raises:
            DatasetDamaged: a part is missing, unknown or at odds with another.
        """
        try:
            value = parsed(text, "it", error=InvalidInput)
            columns = tuple(_column(column) for column in value["columns"])
            manifest = cls(_count(value["samples"]), value["skeleton"], columns)
            _validate(manifest)
        except (TorchordError, *FOREIGN) as error:
            raise DatasetDamaged(f"the manifest cannot be used: {error!r:.300}") from error
        return manifest

    def streams(self) -> Iterator[Stream]:
        """Every stream of every column."""
        return (stream for column in self.columns for stream in column.streams())

    def describe(self) -> str:
        """One sample in words, as in "(tensor float32 [1, 8, 8], int)"."""

        def shown(node: Any) -> str:
            if node is None:
                return "None"
            ((tag, body),) = node.items()
            if tag == "leaf":
                column = self.columns[body]
                words = [column.leaf.kind]
                if column.leaf.kind in ("tensor", "array", "scalar"):
                    words.append(column.leaf.dtype)
                if column.leaf.kind in ("tensor", "array"):
                    words.append("[...]" if column.shape is None else str(list(column.shape)))
                return " ".join(words)
            if tag == "dict":
                return "{" + ", ".join(f"{key!r}: {shown(item)}" for key, item in body) + "}"
            inside = ", ".join(map(shown, body))
            return f"[{inside}]" if tag == "list" else f"({inside},)" if len(body) == 1 else f"({inside})"

        return shown(self.skeleton)


# --- samples to values ------------------------------------------------------------------


def take_apart(sample: Any) -> tuple[Any, list[Leaf]]:
    """Describe a sample.

    Returns:
        (skeleton, leaves): None, {"leaf": number}, {"tuple": [...]}, {"list": [...]} or
        {"dict": [[key, ...], ...]}, and the leaf of each number.

    Raises:
        InvalidInput: the sample holds something that cannot be stored; the message names its path.
    """
    leaves: list[Leaf] = []

    def visit(value: Any, path: str) -> Any:
        if value is None:
            return None
        if type(value) in (tuple, list):
            return {type(value).__name__: [visit(item, f"{path}[{i}]") for i, item in enumerate(value)]}
        if type(value) is dict:
            for key in value:
                if type(key) not in (str, int):
                    raise InvalidInput(f"sample{path} has the key {key!r}, but keys must be str or int")
            return {"dict": [[key, visit(item, f"{path}[{key!r}]")] for key, item in value.items()]}
        leaves.append(leaf_of(value, path))
        return {"leaf": len(leaves) - 1}

    return visit(sample, ""), leaves


def leaf_of(value: Any, path: str) -> Leaf:
    """Describe one value.

    Raises:
        InvalidInput: it cannot be stored.
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise InvalidInput(
                f"sample{path} is a sparse, quantized or meta tensor; only dense ones are stored"
            )
        return Leaf(path, "tensor", dtype_name(value.dtype))
    if isinstance(value, str):  # numpy's str_ and bytes_ included
        return Leaf(path, "str", "")
    if isinstance(value, bytes):
        return Leaf(path, "bytes", "")
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind not in _NUMPY_KINDS or value.dtype.itemsize == 0:
            raise InvalidInput(
                f"sample{path} is an array of dtype {value.dtype}; only numbers, dates and strings are stored"
            )
        return Leaf(path, "array" if isinstance(value, np.ndarray) else "scalar", value.dtype.str)
    for kind, types in (("bool", bool), ("int", int), ("float", float)):
        if isinstance(value, types):
            return Leaf(path, kind, _PLAIN[kind][1])
    raise InvalidInput(
        f"sample{path} is a {type(value).__module__}.{type(value).__qualname__}; a dataset may hold tensors, "
        "arrays, numbers, bytes, str and None in dicts, tuples and lists: convert it first"
    )


def follow(skeleton: Any, sample: Any) -> list[Any]:
    """Return the values of a sample in the order of a skeleton's numbers.

    Raises:
        InvalidInput: the sample is built otherwise; the message names the place.
    """
    values: list[Any] = []

    def visit(node: Any, value: Any, path: str) -> None:
        body: Any
        if node is None:
            if value is not None:
                raise InvalidInput(f"sample{path} is a {type(value).__name__}, but None in the first sample")
            return
        ((tag, body),) = node.items()
        if tag == "leaf":
            values.append(value)
            return
        items: Any = value
        if type(value) is not _NESTS[tag] or len(items) != len(body):
            size = f" of {len(value)}" if hasattr(value, "__len__") else ""
            raise InvalidInput(
                f"sample{path} is a {type(value).__name__}{size}, but a {tag} of {len(body)} in the first "
                "sample"
            )
        if tag == "dict":
            for key, inner in body:
                if key not in items:
                    raise InvalidInput(f"sample{path} lacks the key {key!r} of the first sample")
                visit(inner, items[key], f"{path}[{key!r}]")
        else:
            for i, (inner, item) in enumerate(zip(body, items, strict=True)):
                visit(inner, item, f"{path}[{i}]")

    visit(skeleton, sample, "")
    return values


def encode(leaf: Leaf, value: Any) -> Value:
    """Return a value's bytes.

    Raises:
        InvalidInput: it is of another kind or dtype than the leaf.
    """
    found = leaf_of(value, leaf.path) if value is not None else None
    if found != leaf:
        shown = "None" if found is None else f"{found.kind} {found.dtype}".strip()
        raise InvalidInput(
            f"sample{leaf.path} is {shown}, but {leaf.kind} {leaf.dtype}".rstrip() + " in the first sample"
        )
    if leaf.kind == "tensor":
        return Value(memory(plain(value)), tuple(value.shape))
    if leaf.kind in ("array", "scalar"):
        return Value(np.asarray(value).tobytes(), tuple(value.shape))
    if leaf.kind in _PLAIN:
        try:
            return Value(struct.pack(_PLAIN[leaf.kind][0], value), ())
        except (struct.error, OverflowError) as error:
            raise InvalidInput(f"sample{leaf.path} is {value!r}, which does not fit 64 bits") from error
    data = value.encode("utf-8", "surrogatepass") if leaf.kind == "str" else value
    return Value(data, (len(data),))


def plain(tensor: Tensor) -> Tensor:
    """The same elements on the CPU, contiguous, without gradient and pending conjugation."""
    return tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()


def rows_of(array: Tensor | np.ndarray[Any, Any]) -> memoryview:
    """The elements of a whole column as bytes, without a copy if they lie one behind the other."""
    if isinstance(array, Tensor):
        return memory(plain(array))
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).data if flat.size else memoryview(b"")


# --- values to samples ------------------------------------------------------------------


def decode_rows(column: Column, rows: Bytes) -> list[Any]:
    """Turn values of one shape back.

    Args:
        column: where they belong.
        rows: uint8, shape (values, column.value_nbytes), owned by the caller's samples; one row may lie
            any multiple of the dtype's size behind the other.
    """
    leaf, shape = column.leaf, column.shape
    assert shape is not None
    if leaf.kind == "tensor":
        return list(_tensor(rows, leaf.dtype, (len(rows), *shape)).unbind(0))
    array = rows.view(np.dtype(leaf.dtype)).reshape(len(rows), *shape)
    if leaf.kind in _PLAIN:
        return array.tolist()  # type: ignore[no-any-return]
    if leaf.kind == "array" and not shape:
        return [array[i : i + 1].reshape(()) for i in range(len(array))]
    return list(array)


def decode_one(leaf: Leaf, data: Bytes, shape: Sequence[int] | None) -> Any:
    """Turn one value of a column of different shapes back.

    Args:
        leaf: where it belongs.
        data: uint8, 1-D, owned by the caller's sample.
        shape: its shape; None for str and bytes.
    """
    if leaf.kind == "bytes":
        return data.tobytes()
    if leaf.kind == "str":
        return data.tobytes().decode("utf-8", "surrogatepass")
    assert shape is not None
    if leaf.kind == "tensor":
        return _tensor(data, leaf.dtype, tuple(shape))
    return data.view(np.dtype(leaf.dtype)).reshape(tuple(shape))


def _tensor(data: Bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    if not data.size:  # numpy gives it strides that torch does not take
        return torch.empty(shape, dtype=dtype_of(dtype))
    return torch.from_numpy(data).view(dtype_of(dtype)).view(shape)


def assemble(skeleton: Any, columns: Sequence[Sequence[Any]], count: int) -> list[Any]:
    """Build samples from the values of each column.

    Args:
        skeleton: of a sample.
        columns: for each number of the skeleton, `count` values.
        count: how many samples.
    """
    if skeleton is None:
        return [None] * count
    ((tag, body),) = skeleton.items()
    if tag == "leaf":
        return list(columns[body])
    if not body:
        return [_NESTS[tag]() for _ in range(count)]
    if tag == "dict":
        names = [key for key, _ in body]
        parts = [assemble(node, columns, count) for _, node in body]
        return [dict(zip(names, values, strict=True)) for values in zip(*parts, strict=True)]
    parts = [assemble(node, columns, count) for node in body]
    make: Callable[[Any], Any] = list if tag == "list" else tuple
    return [make(values) for values in zip(*parts, strict=True)]


# --- reading a manifest -----------------------------------------------------------------


def _column(value: Mapping[str, Any]) -> Column:
    shape = None if value["shape"] is None else tuple(map(_count, value["shape"]))
    if shape is not None and len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"{len(shape)} dimensions")
    ends, shapes = value["ends"], value["shapes"]
    return Column(
        Leaf(str(value["path"]), str(value["kind"]), str(value["dtype"])),
        shape,
        Stream.from_json(value["data"]),
        None if ends is None else Stream.from_json(ends),
        None if shapes is None else Stream.from_json(shapes),
    )


def _validate(manifest: DatasetManifest) -> None:
    if manifest.samples < 1:
        raise ValueError(f"{manifest.samples} samples")
    numbers: list[int] = []
    _check_skeleton(manifest.skeleton, numbers)
    if numbers != list(range(len(manifest.columns))):
        raise ValueError(f"the skeleton names columns {numbers}, there are {len(manifest.columns)}")
    for column in manifest.columns:
        _check_column(column, manifest.samples)


def _count(value: Any) -> int:
    if type(value) is int and 0 <= value < 1 << 63:
        return value
    raise ValueError(f"{value!r:.60} is no count")


def _check_skeleton(node: Any, numbers: list[int]) -> None:
    if node is None:
        return
    ((tag, body),) = node.items()
    if tag == "leaf":
        numbers.append(_count(body))
    elif tag == "dict":
        for key, inner in body:
            if type(key) not in (str, int):
                raise ValueError(f"key {key!r}")
            _check_skeleton(inner, numbers)
    elif tag in ("tuple", "list"):
        for inner in body:
            _check_skeleton(inner, numbers)
    else:
        raise ValueError(f"unknown node {tag!r}")


def _check_column(column: Column, samples: int) -> None:
    leaf = column.leaf
    if len(leaf.dtype) > _MOST_DTYPE:
        raise ValueError(f"unknown dtype {leaf.dtype!r:.60}")
    if leaf.kind not in _KINDS:
        raise ValueError(f"unknown kind {leaf.kind!r}")
    if leaf.kind in ("array", "scalar") and np.dtype(leaf.dtype).kind not in _NUMPY_KINDS:
        raise ValueError(f"unknown dtype {leaf.dtype!r}")
    if leaf.kind in _PLAIN and (leaf.dtype != _PLAIN[leaf.kind][1] or column.shape != ()):
        raise ValueError(f"{leaf.kind} of dtype {leaf.dtype!r}, shape {column.shape}")
    if leaf.kind in _TEXT and (leaf.dtype or column.shape is not None or column.ends is None):
        raise ValueError(f"{leaf.kind} without ends")
    if leaf.itemsize < 1:
        raise ValueError(f"dtype {leaf.dtype!r} has no bytes")
    if column.shape is not None:
        if min(column.shape, default=0) < 0 or column.data.nbytes != samples * column.value_nbytes:
            raise ValueError(f"{column.data.nbytes} bytes do not make {samples} of shape {column.shape}")
        return
    if column.ends is None or column.ends.nbytes != 8 * samples:
        raise ValueError("a column of different lengths needs the end of each value")
    if leaf.kind not in _TEXT and (column.shapes is None or column.shapes.nbytes % (8 * samples)):
        raise ValueError("a column of different shapes needs the shape of each value")
