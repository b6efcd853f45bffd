"""Bytes <-> tensors: what goes in comes out, bit for bit, and bad manifests are refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchord.cache.errors import InvalidInput, ManifestMismatch
from torchord.cache.tensors import codec

DTYPES = [
    d
    for d in {v for v in vars(torch).values() if isinstance(v, torch.dtype)}
    if not str(d).startswith(("torch.q", "torch.uint1\n"))
]


def random_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def bits(tensor: torch.Tensor) -> list[int]:
    return list(codec.memory(tensor.contiguous()))


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=codec.dtype_name)
def test_every_dtype_round_trips_bit_for_bit(dtype):
    raw = random_bytes(6 * dtype.itemsize)
    if dtype == torch.bool:
        raw = raw % 2
    tensors = {"x": raw.view(dtype).view(2, 3)}
    manifest = codec.layout(tensors)
    again = codec.views(codec.pack(tensors, manifest), manifest)["x"]
    assert again.dtype == dtype and again.shape == (2, 3)
    assert torch.equal(again.view(6).view(torch.uint8), raw)


def test_scalars_empties_and_strides():
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    tensors = {
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 7),
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": torch.tensor([1.0]).expand(5),
        "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "negative": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }
    manifest = codec.layout(tensors)
    again = codec.views(codec.pack(tensors, manifest), manifest)
    assert list(again) == list(tensors)
    for name, tensor in tensors.items():
        assert again[name].shape == tensor.shape and torch.equal(again[name], tensor.detach()), name
    assert all(spec.offset % 64 == 0 for spec in manifest.tensors) and manifest.nbytes % 64 == 0


def test_nan_payloads_and_negative_zero_survive():
    raw = torch.tensor([0x7FC01234, -0x003FFFFF, -0x80000000], dtype=torch.int32)
    tensors = {"x": raw.view(torch.float32)}
    manifest = codec.layout(tensors)
    assert bits(codec.views(codec.pack(tensors, manifest), manifest)["x"]) == bits(raw)


def test_the_bytes_depend_on_values_only():
    tensor = torch.randn(5, 7)
    manifest = codec.layout({"a": tensor, "b": tensor})
    dirty = torch.full((manifest.nbytes,), 255, dtype=torch.uint8)
    one = codec.pack({"a": tensor, "b": tensor}, manifest, out=dirty)
    two = codec.pack({"b": tensor, "a": tensor.t().contiguous().t()}, manifest)
    assert one.data_ptr() == dirty.data_ptr() and torch.equal(one, two)


def test_views_share_memory_and_outlive_the_name():
    tensors = {"w": torch.zeros(4)}
    manifest = codec.layout(tensors)
    buffer = codec.pack(tensors, manifest)
    view = codec.views(buffer, manifest)["w"]
    buffer[:4] = torch.tensor([0, 0, 128, 63], dtype=torch.uint8)
    assert view[0] == 1.0


def test_nothing_at_all():
    manifest = codec.layout({})
    assert manifest.nbytes == 0
    assert codec.views(codec.pack({}, manifest), manifest) == {}


@given(
    st.dictionaries(
        st.text(max_size=8),
        st.tuples(
            st.lists(st.integers(0, 5), max_size=3), st.sampled_from(["float32", "bool", "int64", "bfloat16"])
        ),
        max_size=5,
    )
)
def test_the_manifest_travels_as_json(entries):
    tensors = {n: torch.zeros(shape, dtype=codec.dtype_of(dtype)) for n, (shape, dtype) in entries.items()}
    manifest = codec.layout(tensors)
    again = codec.Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
    assert again == manifest
    codec.check(again, tensors)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"nbytes": 64, "tensors": [["x"]]},
        {"nbytes": 64, "tensors": [["x", [2], "float32", 0, 9]]},
        {"nbytes": 64, "tensors": [["x", [-2], "float32", 0, -8]]},
        {"nbytes": 64, "tensors": [["x", [2], "load", 0, 8]]},
        {"nbytes": 64, "tensors": [["x", [2], "float32", 3, 8]]},
        {"nbytes": 64, "tensors": [["x", [2], "float32", 64, 8]]},
        {"nbytes": 64, "tensors": [["x", [2], "float32", 0, 8], ["y", [2], "float32", 0, 8]]},
        {"nbytes": 128, "tensors": [["x", [2], "float32", 0, 8], ["x", [2], "float32", 64, 8]]},
    ],
)
def test_a_bad_manifest_is_refused(value):
    with pytest.raises(ManifestMismatch):
        codec.Manifest.from_json(value)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "'w' is in the manifest but not"),
        ({"w": torch.zeros(3)}, r"'w' has shape \(3,\)"),
        ({"w": torch.zeros(2, dtype=torch.int32)}, "'w' has dtype int32"),
        ({"w": torch.zeros(2), "z": torch.zeros(1)}, "'z' is in the model but not"),
    ],
)
def test_check_names_the_first_difference(tensors, words):
    with pytest.raises(ManifestMismatch, match=words):
        codec.check(codec.layout({"w": torch.zeros(2)}), tensors)


def test_unusable_buffers_are_refused():
    manifest = codec.layout({"w": torch.zeros(2)})
    for buffer in (torch.zeros(64), torch.zeros(8, 8, dtype=torch.uint8), torch.zeros(63, dtype=torch.uint8)):
        with pytest.raises(InvalidInput):
            codec.views(buffer, manifest)
    with pytest.raises(InvalidInput, match="multiple of 64"):
        codec.views(torch.zeros(80, dtype=torch.uint8)[16:], manifest)


def test_sparse_and_meta_tensors_are_refused():
    for tensor in (torch.eye(2).to_sparse(), torch.empty(2, device="meta")):
        with pytest.raises(InvalidInput, match="'w'"):
            codec.layout({"w": tensor})


def test_memory_is_the_tensors_own():
    tensor = torch.zeros(3, dtype=torch.int16)
    view = codec.memory(tensor)
    view[2] = 7
    assert tensor.tolist() == [0, 7, 0] and len(view) == 6
    assert len(codec.memory(torch.empty(0))) == 0
    for unusable in (torch.zeros(2, 3).t(), torch.eye(2).to_sparse(), torch.empty(2, device="meta")):
        with pytest.raises(InvalidInput):
            codec.memory(unusable)
