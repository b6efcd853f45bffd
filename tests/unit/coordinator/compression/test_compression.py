"""Gradient codecs: what comes back, what is remembered, and that only values decide the bytes."""

from __future__ import annotations

import hashlib
import itertools
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from tests.support.inprocess import same
from tests.support.layouts import LAYOUTS, Change
from torchord.cache.errors import ConfigError, InvalidInput, ManifestMismatch, NotAllowed
from torchord.cache.tensors.codec import dtype_name, layout, memory, pack, views
from torchord.coordinator.compression import Codec, Encoded, Plain, TensorCodec
from torchord.coordinator.compression.bits import (
    pack_bits,
    pack_places,
    places_layout,
    unpack_bits,
    unpack_places,
)
from torchord.coordinator.compression.number_formats import FORMATS, SLICE, number_format
from torchord.coordinator.compression.powersgd import orthonormalised
from torchord.coordinator.compression.topk import largest
from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.spec.admission import Admission
from torchord.coordinator.spec.codecs import CODECS, check, parse

ROOT = Path(__file__).resolve().parents[4]
PAGE = ROOT / "docs" / "compression.md"
LOSSY = (
    "fp16",
    "fp16:feedback=on",
    "bf16",
    "bf16:on",
    "int8",
    "int8:64,feedback=off",
    "sign",
    "sign:64,off",
    "topk:0.05",
    "topk:0.05,values=fp32",
    "topk:0.05,values=int8",
    "topk:0.05,values=sign,feedback=off",
    "powersgd:1",
    "powersgd:3,values=bf16",
    "powersgd:2,values=int8",
    "powersgd:1,values=int4,least=300",
    "powersgd:2,feedback=off",
    "int8:memory=fp16",
    "sign:memory=bf16",
    "topk:0.05,memory=int8",
    "powersgd:2,values=int8,memory=int4",
)
# torch warns that complex32 is experimental, whatever one does with it.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
FED_BACK = tuple(spec for spec in LOSSY if parse(spec).feedback and "memory" not in spec)  # type: ignore[attr-defined]
ROUNDED = tuple(spec for spec in LOSSY if "memory" in spec)
ALL = ("none", *LOSSY)
LAID_OUT = ("int8", "sign", "topk:0.05", "powersgd:1", "powersgd:3,values=bf16", "powersgd:2,feedback=off")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
OTHERS = (torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
SHAPES = ((), (1,), (0,), (3, 0), (7,), (33, 20), (5, 4, 3, 3), (1, 1, 1), (1, 5000), (2049,), (64, 65))


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal deviates; other dtypes by conversion."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        return torch.randn(shape, dtype=torch.complex128, generator=generator).to(dtype)
    return torch.randn(shape, dtype=torch.float64, generator=generator).mul(3).to(dtype)


def model(seed: int = 0) -> dict[str, Tensor]:
    """Gradients of the kinds that a model has."""
    shapes = {"conv.weight": (16, 8, 3, 3), "conv.bias": (16,), "fc.weight": (40, 300), "scale": ()}
    return {name: random(shape, seed=seed + place) for place, (name, shape) in enumerate(shapes.items())}


def wide(tensor: Tensor) -> Tensor:
    """In float64, in which sums of two float32 are exact; a complex number as two reals."""
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).double()


def digest(*groups: Mapping[str, Tensor]) -> str:
    """Of names, shapes, dtypes and bytes."""
    found = hashlib.blake2b(digest_size=12)
    for group in groups:
        manifest = layout(group)
        found.update(repr(manifest).encode() + bytes(memory(pack(group, manifest))))
    return found.hexdigest()


# --- round trips ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (*FLOATS, *COMPLEX, *OTHERS), ids=dtype_name)
@pytest.mark.parametrize("spec", ALL)
def test_every_dtype_and_shape_comes_back_as_it_was(spec: str, dtype: torch.dtype) -> None:
    codec = parse(spec)
    gradients = {f"p{shape}": random(shape, dtype) for shape in SHAPES}
    before = {name: gradient.clone() for name, gradient in gradients.items()}
    encoded = codec.encode(gradients, None)
    decoded = codec.decode(encoded.payload, layout(gradients))
    assert list(decoded) == list(gradients)
    for name, gradient in gradients.items():
        assert decoded[name].dtype == dtype and decoded[name].shape == gradient.shape, name
        assert decoded[name].is_contiguous()
        assert same(gradient, before[name]), "an argument was written to"
        if name in encoded.payload:
            assert same(decoded[name], gradient), "what travels as it is, arrives as it is"
    again = codec.decode(encoded.payload, gradients)
    assert all(same(again[name], decoded[name]) for name in gradients)


@pytest.mark.parametrize("spec", LOSSY)
def test_what_cannot_get_smaller_travels_as_it_is(spec: str) -> None:
    gradients = {"scalar": random(()), "empty": random((0, 3)), "integers": random((50, 50), torch.int32)}
    encoded = parse(spec).encode(gradients, None)
    assert list(encoded.payload) == list(gradients) and encoded.residual == {}


@pytest.mark.parametrize("spec", LOSSY)
def test_the_payload_survives_the_flat_buffer(spec: str) -> None:
    """As views at the offsets of a received buffer, with the memory beside it."""
    codec, gradients = parse(spec), model()
    encoded = codec.encode(gradients, None)
    payload_layout, memory_layout = layout(encoded.payload), layout(encoded.residual)
    payload = views(pack(encoded.payload, payload_layout), payload_layout)
    held = views(pack(encoded.residual, memory_layout), memory_layout)
    assert digest(codec.decode(payload, gradients)) == digest(codec.decode(encoded.payload, gradients))
    one, two = (codec.encode(model(seed=9), kept) for kept in (held, encoded.residual))
    assert digest(one.payload, one.residual) == digest(two.payload, two.residual)


def test_none_is_the_identity_and_remembers_nothing() -> None:
    gradients = {"w": torch.tensor([math.nan, -0.0, math.inf]), "i": torch.tensor(3)}
    encoded = Plain().encode(gradients, {"w": torch.ones(3)})
    assert encoded.payload["w"] is gradients["w"] and encoded.residual == {} and not Plain().stateful
    assert all(
        same(found, gradients[name]) for name, found in Plain().decode(encoded.payload, gradients).items()
    )


@pytest.mark.parametrize(
    ("spec", "limit"),
    [("fp16", 2**-11), ("bf16", 2**-8), ("int8", 0.5 / 127 * 1.001), ("int8:64", 0.5 / 127 * 1.001)],
)
@given(
    values=hnp.arrays(
        np.float32,
        hnp.array_shapes(max_dims=3, max_side=40),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    )
)
@settings(max_examples=60, deadline=None)
def test_quantised_elements_are_near(spec: str, limit: float, values: Any) -> None:
    """Relative to the element (fp16: or 2^-26 of the tensor's peak), for int8 to the peak."""
    gradient = torch.from_numpy(values)
    codec = parse(spec)
    decoded = codec.decode(codec.encode({"w": gradient}, None).payload, {"w": gradient})["w"]
    peak = wide(gradient).abs().max()
    scale = (
        peak if spec.startswith("int8") else wide(gradient).abs() + (peak * 2**-26 if spec == "fp16" else 0)
    )
    assert bool(((wide(decoded) - wide(gradient)).abs() <= limit * scale + 2**-125).all())


@pytest.mark.parametrize("size", [1e-38, 1e-12, 1.0, 1e6, 3e38])
def test_fp16_neither_overflows_nor_underflows(size: float) -> None:
    gradient = torch.tensor([1.0, -0.25, 2.0**-13, 0.0] * 8) * size
    codec = parse("fp16")
    decoded = codec.decode(codec.encode({"w": gradient}, None).payload, {"w": gradient})["w"]
    torch.testing.assert_close(decoded, gradient, rtol=2**-11, atol=0.0)


@pytest.mark.parametrize("spec", LOSSY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_the_largest_finite_numbers_stay_finite(spec: str, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    if spec.startswith("powersgd"):
        most = most**0.4  # products of matrices have to be representable
    gradient = torch.full((40, 40), most, dtype=dtype)
    gradient[::3] *= -1
    codec = parse(spec)
    encoded = codec.encode({"w": gradient}, None)
    assert bool(codec.decode(encoded.payload, {"w": gradient})["w"].isfinite().all())
    assert all(bool(kept.isfinite().all()) for kept in encoded.residual.values())


@pytest.mark.parametrize("spec", LOSSY)
def test_zeros_and_denormals(spec: str) -> None:
    codec = parse(spec)
    for value in (0.0, -0.0, 1e-44):
        gradient = {"w": torch.full((40, 40), value)}
        encoded = codec.encode(gradient, None)
        decoded = codec.decode(encoded.payload, gradient)["w"]
        assert bool((decoded.abs() <= 2e-44).all())
        assert bool(
            codec.decode(codec.encode(gradient, encoded.residual).payload, gradient)["w"].isfinite().all()
        )


# --- error feedback ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (*FLOATS, *COMPLEX), ids=dtype_name)
@pytest.mark.parametrize("spec", FED_BACK)
def test_what_is_sent_and_what_is_kept_are_what_there_was(spec: str, dtype: torch.dtype) -> None:
    """decode + e' = g + e: the sum rounds once and the difference once, each by at most half an ulp."""
    codec = parse(spec)
    kept: dict[str, Tensor] = {}
    for step in range(3):
        gradients = {f"p{shape}": random(shape, dtype, seed=step) for shape in SHAPES}
        encoded = codec.encode(gradients, kept)
        decoded = codec.decode(encoded.payload, gradients)
        for name, gradient in gradients.items():
            if name not in encoded.residual:
                assert same(decoded[name], gradient)
                continue
            error = wide(encoded.residual[name])
            there = wide(gradient) + (wide(kept[name]) if name in kept else 0)
            off = (wide(decoded[name]) + error - there).abs()
            eps = torch.finfo(encoded.residual[name].dtype).eps
            assert bool((off <= 1.0001 * eps / 2 * (there.abs() + error.abs())).all()), name
        kept = encoded.residual


@pytest.mark.parametrize("spec", ["topk:0.05,values=fp32", "topk:0.1,values=fp32", "bf16:on", "fp16:on"])
@given(
    arrays=st.tuples(
        *[hnp.arrays(np.float32, (17, 19), elements=st.floats(-(2.0**100), 2.0**100, width=32))] * 2
    )
)
@settings(max_examples=40, deadline=None)
def test_the_identity_is_exact_where_nothing_rounds(spec: str, arrays: tuple[Any, Any]) -> None:
    """float32 values leave 0; a rounded value is within a factor of two, so the difference is exact."""
    gradient, held = map(torch.from_numpy, arrays)
    codec = parse(spec)
    encoded = codec.encode({"w": gradient}, {"w": held})
    decoded = codec.decode(encoded.payload, {"w": gradient})["w"]
    small = (gradient + held).abs() < 2.0**-100  # beyond the range of fp16's one scale, or denormal
    assert bool(((wide(decoded) + wide(encoded.residual["w"]) == wide(gradient + held)) | small).all())


@pytest.mark.parametrize("spec", FED_BACK)
def test_nothing_is_lost_over_many_steps(spec: str) -> None:
    codec, kept = parse(spec), {}
    given_total = {name: torch.zeros(g.shape, dtype=torch.float64) for name, g in model().items()}
    sent_total = {name: total.clone() for name, total in given_total.items()}
    for step in range(20):
        gradients = model(seed=100 * step)
        encoded = codec.encode(gradients, kept)
        kept = encoded.residual
        for name, decoded in codec.decode(encoded.payload, gradients).items():
            given_total[name] += gradients[name]
            sent_total[name] += decoded
    for name, total in given_total.items():
        torch.testing.assert_close(sent_total[name] + kept.get(name, 0.0), total, rtol=0, atol=2e-4)


@pytest.mark.parametrize("spec", LOSSY)
def test_a_parameter_without_gradient_keeps_its_memory(spec: str) -> None:
    codec = parse(spec)
    first = codec.encode(model(), None)
    some = {name: gradient for name, gradient in model(seed=5).items() if name != "fc.weight"}
    second = codec.encode(some, first.residual)
    assert "fc.weight" not in codec.decode(second.payload, model())
    for key, kept in first.residual.items():
        if key.partition("#")[0] == "fc.weight":
            assert same(second.residual[key], kept)
    assert list(second.residual) == sorted(first.residual)


@pytest.mark.parametrize("spec", LOSSY)
def test_stateful_says_whether_there_is_a_memory(spec: str) -> None:
    codec = parse(spec)
    assert bool(codec.encode(model(), None).residual) == codec.stateful


@pytest.mark.parametrize("spec", [*FED_BACK, *ROUNDED])
def test_no_gradients_at_all(spec: str) -> None:
    kept = parse(spec).encode(model(), None).residual
    encoded = parse(spec).encode({}, kept)
    assert encoded.payload == {} and digest(encoded.residual) == digest(kept)


@pytest.mark.parametrize(
    ("spec", "held"),
    [
        ("topk:0.05", {"w": torch.zeros(20, 21)}),
        ("topk:0.05", {"w": torch.zeros(20, 20, dtype=torch.float64)}),
        ("topk:0.05", {"b": torch.zeros(3)}),
        ("powersgd:2", {"w#q": torch.zeros(20, 1)}),
        ("fp16", {"w": torch.zeros(20, 20)}),
        ("topk:0.05", {"w#held": torch.zeros(404, dtype=torch.uint8)}),
        ("topk:0.05,memory=int8", {"w": torch.zeros(20, 20)}),
        ("topk:0.05,memory=int8", {"w#held": torch.zeros(400, dtype=torch.uint8)}),
        ("topk:0.05,memory=int8", {"w#held": torch.zeros(404, dtype=torch.int8)}),
    ],
)
def test_the_memory_of_another_codec_or_model_is_refused(spec: str, held: dict[str, Tensor]) -> None:
    gradients = {"w": random((20, 20)), "b": random((3,))}
    with pytest.raises(ManifestMismatch):
        parse(spec).encode(gradients, held)


@pytest.mark.parametrize("dtype", (*FLOATS, torch.complex64), ids=dtype_name)
@pytest.mark.parametrize("spec", ROUNDED)
def test_a_memory_in_fewer_bits_is_the_whole_one_rounded(spec: str, dtype: torch.dtype) -> None:
    """Both ways: what is kept is Q(e'), and what is added to the next gradient is what Q(e') stands for."""
    whole, _, memory_name = spec.partition("memory=")
    rounded, plain, numbers = parse(spec), parse(whole.rstrip(",:")), number_format(memory_name)
    shapes = {"fc": (40, 300), "conv": (16, 8, 3, 3)}
    first, second = ({name: random(shape, dtype, seed) for name, shape in shapes.items()} for seed in (1, 2))
    kept, expected = rounded.encode(first, None), plain.encode(first, None)
    assert digest(kept.payload) == digest(expected.payload)
    held = dict(expected.residual)
    for name in shapes:
        error = held[name]
        real = torch.view_as_real(error) if error.is_complex() else error
        parts = {
            part: torch.zeros(shape, dtype=what)
            for part, (what, shape) in numbers.layout(real.numel(), real.dtype).items()
        }
        numbers.pack(real, float(real.abs().max()), parts)
        back = numbers.unpack(parts, real.numel(), real.dtype).view(real.shape)
        held[name] = torch.view_as_complex(back) if error.is_complex() else back
        assert kept.residual[f"{name}#held"].numel() == sum(p.nbytes for p in parts.values()) < error.nbytes
    assert digest(rounded.encode(second, kept.residual).payload) == digest(plain.encode(second, held).payload)


def test_a_name_with_the_separator_is_refused() -> None:
    with pytest.raises(InvalidInput, match="'a#b'"):
        parse("int8").encode({"a#b": random((20, 20))}, None)


# --- only values decide -----------------------------------------------------------------


def two_steps(spec: str, change: Any = lambda tensor: tensor) -> str:
    """Digest of payloads, memory and decoded gradients of two steps."""
    codec = parse(spec)
    with pinned(1, True, restore=True):
        first = codec.encode({name: change(g) for name, g in model().items()}, {})
        held = {name: change(kept) for name, kept in first.residual.items()}
        second = codec.encode({name: change(g) for name, g in model(seed=50).items()}, held)
        arrived = {name: change(part) for name, part in second.payload.items()}
        return digest(first.payload, second.payload, second.residual, codec.decode(arrived, model()))


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("spec", LOSSY)
def test_alignment_and_strides_do_not_show(spec: str, change: Change) -> None:
    assert two_steps(spec, change) == two_steps(spec)


@pytest.mark.slow
def test_another_process_gives_the_same_bytes() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.unit.coordinator.compression.test_compression import LOSSY, two_steps\n"
        "print('\\n'.join(map(two_steps, LOSSY)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, str(ROOT)], capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.split() == list(map(two_steps, LOSSY))


@pytest.mark.parametrize("spec", [spec for spec in LOSSY if not spec.startswith("powersgd")])
def test_the_thread_count_does_not_show(spec: str) -> None:
    """Of the codecs without matrix products."""
    codec, gradients, digests = parse(spec), {"w": random((700, 300))}, set()
    for threads in (1, 2, 3):
        with pinned(threads, True, restore=True):
            encoded = codec.encode(gradients, codec.encode(gradients, None).residual)
            digests.add(digest(encoded.payload, encoded.residual, codec.decode(encoded.payload, gradients)))
    assert len(digests) == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("spec", ALL)
def test_a_gpu_gives_the_bytes_of_a_cpu(spec: str) -> None:
    codec, gradients = parse(spec), {"w": random((700, 300)), "b": random((300,))}
    held = codec.encode({"w": random((700, 300), seed=3)}, None).residual
    here = codec.encode(gradients, held)
    with pinned(1, True, "cuda", restore=True):
        there = codec.encode({name: g.cuda() for name, g in gradients.items()}, held)
        back = codec.decode(there.payload, gradients)
    if spec.startswith("powersgd"):
        expected = codec.decode(here.payload, gradients)["w"]
        torch.testing.assert_close(back["w"].cpu(), expected, rtol=1e-2, atol=0.1)
    else:
        assert digest(there.payload, there.residual) == digest(here.payload, here.residual)


# --- NaN and infinity -------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spec", ALL)
def test_what_is_not_finite_arrives_as_such_and_leaves_the_memory_alone(spec: str, value: float) -> None:
    codec = parse(spec)
    kept = codec.encode(model(), None).residual
    for name in model():
        gradients = model(seed=7)
        gradients[name].view(-1)[gradients[name].numel() // 2] = value
        encoded = codec.encode(gradients, kept)
        decoded = codec.decode(encoded.payload, gradients)
        assert not bool(decoded[name].isfinite().all()), name
        assert all(bool(decoded[other].isfinite().all()) for other in decoded if other != name)
        assert digest(encoded.residual) == digest(kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64], ids=dtype_name)
def test_not_finite_in_other_dtypes(dtype: torch.dtype) -> None:
    gradient = {"w": random((30, 30), dtype)}
    gradient["w"][3, 4] = complex(0, math.nan) if dtype.is_complex else math.nan
    for spec in LOSSY:
        codec = parse(spec)
        encoded = codec.encode(gradient, None)
        decoded = codec.decode(encoded.payload, gradient)["w"]
        assert not bool(decoded.isfinite().all()) and encoded.residual == {}
        if "w" not in encoded.payload:
            assert not bool(decoded.isfinite().any())


def test_powersgd_calls_what_would_overflow_a_product_nan() -> None:
    codec, gradient = parse("powersgd:1"), {"w": torch.full((40, 40), 1e20)}
    kept = codec.encode({"w": random((40, 40))}, None).residual
    encoded = codec.encode(gradient, kept)
    assert bool(codec.decode(encoded.payload, gradient)["w"].isnan().all())
    assert digest(encoded.residual) == digest(kept)


def test_a_sum_with_the_memory_that_overflows_is_noticed() -> None:
    most = torch.full((20, 20), torch.finfo(torch.float32).max)
    encoded = parse("int8").encode({"w": most}, {"w": most})
    assert bool(parse("int8").decode(encoded.payload, {"w": most})["w"].isinf().all())


# --- top-k ------------------------------------------------------------------------------


def reference(values: Tensor, count: int) -> list[int]:
    """The places by a stable sort."""
    order = np.argsort(-values.abs().double().numpy(), kind="stable")
    return sorted(order[:count].tolist())


@given(
    values=hnp.arrays(np.float32, st.integers(1, 300), elements=st.integers(-3, 3).map(float)),
    part=st.floats(0.001, 1.0),
)
def test_ties_go_to_the_lowest_index(values: Any, part: float) -> None:
    flat, count = torch.from_numpy(values), max(1, int(part * len(values)))
    assert largest(flat, count).tolist() == reference(flat, count)


@pytest.mark.parametrize("kind", ["normal", "ties", "sorted", "sparse", "periodic", "constant", "zeros"])
@pytest.mark.parametrize("count", [1, 300, 3000])
def test_the_selection_is_exact_when_the_threshold_is_guessed(kind: str, count: int) -> None:
    flat = random((300_000,))
    if kind == "ties":
        flat = flat.round()
    elif kind == "sorted":
        flat = flat.sort().values
    elif kind == "sparse":
        flat[flat.abs() < 9.5] = 0.0
    elif kind == "periodic":  # what the sample sees is the largest there is
        flat[::4] = 100.0
    elif kind == "constant":
        flat = torch.full_like(flat, -2.5)
    elif kind == "zeros":
        flat.zero_()
    assert largest(flat, count).tolist() == reference(flat, count)


def test_topk_sends_the_largest_and_only_those() -> None:
    gradient = random((64, 65))
    codec = parse("topk:0.05,values=fp32")
    decoded = codec.decode(codec.encode({"w": gradient}, None).payload, {"w": gradient})["w"].view(-1)
    places = reference(gradient.view(-1), 208)
    assert decoded.nonzero().view(-1).tolist() == places
    assert same(decoded[places], gradient.view(-1)[places])


@given(st.data())
def test_places_come_back(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5000))
    chosen = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=200))
    places = torch.tensor(sorted(chosen))
    shapes = places_layout(len(chosen), count)
    parts = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in shapes.items()}
    pack_places(places, count, parts)
    assert unpack_places(parts, len(chosen), count).tolist() == sorted(chosen)
    bits = 8 * sum(part.numel() for part in parts.values())
    most = len(chosen) * (2 + max(0.0, math.log2(count / len(chosen)))) + 2
    assert bits <= most + 8 * (1 + shapes["low"][1][0]), "beyond the code's length only whole bytes"


@given(st.lists(st.booleans(), max_size=100))
def test_bits_come_back(bits: list[bool]) -> None:
    packed = pack_bits(torch.tensor(bits, dtype=torch.bool))
    assert packed.numel() == -(-len(bits) // 8)
    assert unpack_bits(packed, len(bits)).tolist() == list(map(int, bits))
    assert [byte >> 8 for byte in packed.tolist()] == [0] * packed.numel()


@given(noise=st.binary(min_size=1, max_size=64))
@settings(max_examples=50, deadline=None)
def test_bytes_of_anybody_are_decoded_or_refused(noise: bytes) -> None:
    like = {"w": torch.empty(40, 40)}
    for spec in LOSSY:
        codec = parse(spec)
        payload = dict(codec.encode({"w": random((40, 40))}, None).payload)
        packed = payload["w#packed"].clone()
        packed[: len(noise)] = torch.frombuffer(bytearray(noise), dtype=torch.uint8)[: packed.numel()]
        try:
            assert codec.decode({"w#packed": packed}, like)["w"].shape == (40, 40)
        except ManifestMismatch:
            assert spec.startswith("topk")


@pytest.mark.parametrize(
    "payload",
    [
        {"x#packed": torch.zeros(3, dtype=torch.uint8)},
        {"w#packed": torch.zeros(3, dtype=torch.uint8)},
        {"w#other": torch.zeros(3, dtype=torch.uint8)},
        {"b#packed": torch.zeros(3, dtype=torch.uint8)},
        {"w#nonfinite": torch.zeros(2)},
        {"w": torch.zeros(40, 41)},
        {"w": torch.zeros(40, 40, dtype=torch.float64)},
    ],
)
@pytest.mark.parametrize("spec", LOSSY)
def test_a_payload_that_does_not_fit_is_refused(spec: str, payload: dict[str, Tensor]) -> None:
    with pytest.raises(ManifestMismatch):
        parse(spec).decode(payload, {"w": torch.empty(40, 40), "b": torch.empty(1)})


def test_the_payload_of_another_codec_is_refused() -> None:
    gradients = {"w": random((40, 40))}
    for one in ("fp16", "int8", "topk:0.1", "powersgd:1"):
        for other in ("sign", "int8:32", "topk:0.2", "powersgd:2"):
            with pytest.raises(ManifestMismatch):
                parse(other).decode(parse(one).encode(gradients, None).payload, gradients)
    with pytest.raises(ManifestMismatch):
        Plain().decode(parse("int8").encode(gradients, None).payload, gradients)


# --- number formats ---------------------------------------------------------------------


@pytest.mark.parametrize("numbers", FORMATS, ids=lambda numbers: numbers.name)
@pytest.mark.parametrize(
    "count", [0, 1, 2, 9, 1023, 1024, 1025, SLICE - 1, SLICE, SLICE + 1, 2 * SLICE + 1027]
)
def test_formats_at_the_edges_of_blocks_and_slices(numbers: Any, count: int) -> None:
    values = random((count,))
    parts = {
        name: torch.zeros(shape, dtype=dtype)
        for name, (dtype, shape) in numbers.layout(count, torch.float32).items()
    }
    peak = float(values.abs().max()) if count else 0.0
    numbers.pack(values, peak, parts)
    found = numbers.unpack(parts, count, torch.float32)
    assert found.shape == (count,)
    limit = {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-11, "int8": 0.51 / 127, "int4": 0.51 / 7, "sign": 1.0}
    assert bool(((found - values).abs() <= limit[numbers.name] * peak).all())
    assert same(numbers.subtract(parts, values.clone()), values - found)


def test_sign_sends_the_mean_magnitude_of_a_block() -> None:
    values = torch.cat((torch.full((32,), 2.0), torch.tensor([1.0, -3.0])))
    codec = parse("sign:16")
    decoded = codec.decode(codec.encode({"w": values}, None).payload, {"w": values})["w"]
    torch.testing.assert_close(decoded, torch.cat((torch.full((32,), 2.0), torch.tensor([2.0, -2.0]))))


def test_an_unknown_number_format_is_named() -> None:
    with pytest.raises(ConfigError, match=r"fp32, bf16, fp16, int8, int4, sign, not 'fp8'"):
        number_format("fp8")


# --- PowerSGD ---------------------------------------------------------------------------


def test_a_matrix_of_low_rank_is_sent_whole() -> None:
    gradient = {"w": random((60, 3)) @ random((3, 8, 10), seed=1).view(3, 80)}
    codec = parse("powersgd:3")
    decoded = codec.decode(codec.encode(gradient, None).payload, gradient)["w"]
    torch.testing.assert_close(decoded, gradient["w"], rtol=0, atol=1e-4)


def test_the_iteration_turns_towards_the_leading_directions() -> None:
    left, right = (torch.linalg.qr(random((80, 80), seed=seed)).Q for seed in (1, 2))
    gradient = {"w": left @ torch.diag(0.8 ** torch.arange(80.0)) @ right.T}
    codec, kept, errors = parse("powersgd:4,feedback=off"), {}, []
    for _ in range(12):
        encoded = codec.encode(gradient, kept)
        kept = encoded.residual
        errors.append(float((codec.decode(encoded.payload, gradient)["w"] - gradient["w"]).norm()))
    best = float((0.8 ** torch.arange(4, 80.0)).norm())
    assert errors[0] > 1.15 * best and best * 0.999 <= errors[-1] <= 1.01 * best
    assert all(later <= earlier * 1.001 for earlier, later in itertools.pairwise(errors))


def test_a_small_matrix_gets_a_higher_rank_or_is_sent_whole() -> None:
    codec = parse("powersgd:1,least=600")
    for shape, numbers in (((100, 200), 2 * 300), ((20, 100), 5 * 120), ((20, 25), 500), ((400, 400), 800)):
        sent = codec.encode({"w": random(shape)}, None).payload
        assert sum(part.numel() * part.element_size() for part in sent.values()) == 4 * numbers, shape
    gradient = {"w": random((20, 5)) @ random((5, 100), seed=1)}
    decoded = codec.decode(codec.encode(gradient, None).payload, gradient)["w"]
    torch.testing.assert_close(decoded, gradient["w"], rtol=0, atol=1e-4)


def test_columns_of_unequal_size_lose_no_levels_to_each_other() -> None:
    """The second direction is a thousandth of the first and shares its block of levels."""
    left, right = (torch.linalg.qr(random((60, 2), seed=seed)).Q for seed in (1, 2))
    codec, kept = parse("powersgd:2,values=int8,feedback=off"), {}
    gradient = {"w": left @ torch.diag(torch.tensor([1.0, 1e-3])) @ right.T}
    for _ in range(4):
        encoded = codec.encode(gradient, kept)
        kept = encoded.residual
    small = left.T @ codec.decode(encoded.payload, gradient)["w"] @ right
    assert float(small[1, 1]) == pytest.approx(1e-3, rel=0.02)


def test_a_direction_that_vanished_comes_back() -> None:
    codec = parse("powersgd:2,feedback=off")
    kept = codec.encode({"w": torch.zeros(30, 30)}, None).residual
    assert bool((kept["w#q"] == 0).all())
    gradient = {"w": random((30, 2)) @ random((2, 30), seed=1)}
    decoded = codec.decode(codec.encode(gradient, kept).payload, gradient)["w"]
    torch.testing.assert_close(decoded, gradient["w"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12])
def test_powersgd_works_at_any_scale(size: float) -> None:
    codec, gradient = parse("powersgd:2"), {"w": random((30, 2)) @ random((2, 40), seed=1) * size}
    kept = codec.encode(gradient, None).residual
    kept["w"].zero_()
    decoded = codec.decode(codec.encode(gradient, kept).payload, gradient)["w"]
    torch.testing.assert_close(decoded / size, gradient["w"] / size, rtol=0, atol=1e-3)


def test_orthonormalised_columns() -> None:
    matrix = random((50, 5))
    matrix[:, 2] = 2 * matrix[:, 0] - matrix[:, 1]
    matrix[:, 3] = 0.0
    found = orthonormalised(matrix)
    torch.testing.assert_close(
        found.T @ found, torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0])), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(found @ found.T @ matrix, matrix, rtol=0, atol=1e-4)


def test_the_first_q_depends_on_name_and_shape_only() -> None:
    gradient = random((30, 30))
    codec = parse("powersgd:2")
    one, again, other = (codec.encode({name: gradient}, None).payload[f"{name}#packed"] for name in "wwv")
    assert same(one, again) and not same(one, other)


# --- what it is for ---------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["none", *FED_BACK, *ROUNDED])
def test_gradient_descent_converges(spec: str) -> None:
    """On a quadratic of condition number 10, in two slots whose optima differ, with a falling step."""
    codec = parse(spec)
    curvature = torch.linspace(0.1, 1.0, 16 * 20).view(16, 20)
    optima = [random((16, 20), seed=seed) for seed in (1, 2)]
    point, best = torch.zeros(16, 20), (optima[0] + optima[1]) / 2
    kept: list[Mapping[str, Tensor]] = [{}, {}]
    began = float((point - best).norm())
    for step in range(600):
        total = torch.zeros_like(point)
        for slot, optimum in enumerate(optima):
            encoded = codec.encode({"w": curvature * (point - optimum)}, kept[slot])
            assert "w" not in encoded.payload or spec == "none"
            kept[slot] = encoded.residual
            total += codec.decode(encoded.payload, {"w": point})["w"]
        point -= 0.1 * (1 - step / 600) * total / 2
    assert float((point - best).norm()) < 0.1 * began


def test_without_feedback_small_elements_never_arrive() -> None:
    gradient = {"w": torch.tensor([1.0] + [0.001] * 63)}
    for spec, arrives in (("int8", True), ("int8:feedback=off", False)):
        codec, kept, total = parse(spec), {}, torch.zeros(64)
        for _ in range(10):
            encoded = codec.encode(gradient, kept)
            kept = encoded.residual
            total += codec.decode(encoded.payload, gradient)["w"]
        assert bool((total[1:] > 0).all()) == arrives


@pytest.mark.parametrize(
    ("spec", "nbytes"),
    [
        ("none", 4 * 300_000),
        ("fp16", 2 * 300_000 + 2),
        ("bf16", 2 * 300_000),
        ("int8", 300_000 + 4 * 293),
        ("int8:256", 300_000 + 4 * 1172),
        ("sign", 37_500 + 4 * 293),
        # 3,000 places: 6 low bits in planes of 375 bytes, 3000 + 299999 // 64 + 1 high bits; 2 bytes a value
        ("topk:0.01", 6 * 375 + 961 + 6000),
        ("topk:0.01,values=fp32", 6 * 375 + 961 + 12_000),
        ("topk:0.01,values=int8", 6 * 375 + 961 + 3000 + 4 * 3),
        ("topk:0.01,values=sign", 6 * 375 + 961 + 375 + 4 * 3),
        ("powersgd:2", 4 * 2 * (300 + 1000)),
        ("powersgd:2,values=int8", 2 * (300 + 1000) + 4 * (1 + 2) + 2),
        ("powersgd:2,values=int4", 300 + 1000 + 4 * (1 + 2) + 2),
        ("powersgd:2,values=int8,least=6499", 4 * (300 + 1000) + 4 * (2 + 4) + 4),
        ("powersgd:2,values=int8,least=400000", 300_000 + 4 * 293),
    ],
)
def test_payload_bytes(spec: str, nbytes: int) -> None:
    """They are a function of the shapes alone."""
    for gradient in (random((300, 1000)), torch.zeros(300, 1000)):
        assert parse(spec).encode({"w": gradient}, None).nbytes == nbytes


# --- specs ------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ALL)
def test_specs_that_are_fine(spec: str) -> None:
    check(spec)
    assert isinstance(parse(spec), Codec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "names no codec; known are 'none', 'fp16', 'bf16', 'int8', 'sign', 'topk:FRACTION'"),
        ("gzip", "names no codec"),
        ("TOPK:0.1", "names no codec"),
        ("topkk:0.1", "names no codec"),
        (None, "must be a string, not None"),
        (8, "must be a string, not 8"),
        ("topk", "missing a required argument: 'fraction'"),
        ("topk:", "ends in a colon"),
        ("topk:0", "fraction must be a number above 0 and at most 1, not 0"),
        ("topk:1.5", "fraction must be"),
        ("topk:nan", "fraction must be"),
        ("topk:many", "fraction must be"),
        ("topk:on", "fraction must be"),
        ("topk:0.1,values=fp8", "values must be one of"),
        ("topk:0.1,values=8", "values must be one of"),
        ("topk:0.1,minimum=0", "minimum must be an integer, at least 1, not 0"),
        ("topk:0.1,level=3", "unexpected keyword argument 'level'; it takes fraction"),
        ("topk:0.1,feedback=maybe", "feedback must be on or off, not 'maybe'"),
        ("topk:fraction=0.1,0.2", "cannot read '0.2'"),
        ("topk:0.1,", "cannot read ''"),
        ("topk:0.1,=3", "cannot read '=3'"),
        ("topk:0.1,minimum=3,minimum=4", "'minimum' is given twice"),
        ("topk:0.1,fraction=0.2", "multiple values for argument 'fraction'"),
        ("powersgd:0", "rank must be an integer, at least 1, not 0"),
        ("powersgd:1.5", "rank must be an integer"),
        ("int8:1000", "block must be a power of two from 16 to 65536, not 1000"),
        ("topk:0.1,memory=sign", "memory must be one of full, bf16, fp16, int8, int4, not 'sign'"),
        ("powersgd:1,memory=8", "memory must be one of full, bf16, fp16, int8, int4, not 8"),
        ("bf16:memory=int8", "memory=int8 needs feedback=on"),
        ("none:1", "too many positional arguments; it takes no arguments"),
    ],
)
def test_specs_that_are_not(spec: Any, message: str) -> None:
    for function in (check, parse):
        with pytest.raises(ConfigError) as caught:
            function(spec)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value) and not str(caught.value).endswith(".")


def test_the_documented_codec_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of docs/compression.md, imported as a worker would."""
    (tmp_path / "my_codecs.py").write_text(PAGE.read_text().split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NotAllowed):
        parse("my_codecs:EveryNth:3", resolve=Admission(("elsewhere",)).fetch)
    codec = parse("my_codecs:EveryNth:3,feedback=on", resolve=Admission(("my_codecs", "coordinator")).fetch)
    assert isinstance(codec, TensorCodec) and codec.stateful
    gradient = {"w": random((6, 10)), "tiny": random((20,))}
    encoded = codec.encode(gradient, None)
    assert list(encoded.payload) == ["w#packed", "tiny"], "64 bytes must be saved"
    decoded = codec.decode(encoded.payload, gradient)["w"]
    assert same(decoded + encoded.residual["w"], gradient["w"])
    assert decoded.view(-1).nonzero().view(-1).tolist() == list(range(0, 60, 3))
    half = {"w": random((6, 10), torch.bfloat16)}
    kept = codec.encode(half, None)
    assert "w" in kept.payload, "20 float32 are no smaller than 60 bfloat16"


def test_an_import_path_is_resolved_within_the_allow_list() -> None:
    check("my_codecs:Sign:0.5")  # nothing is imported
    with pytest.raises(NotAllowed, match="may not import 'subprocess'"):
        parse("subprocess:Popen:ls")
    with pytest.raises(ConfigError, match=r"no module 'nowhere_at_all'.*known are 'none'"):
        parse("nowhere_at_all:Codec", resolve=Admission(("*",)).fetch)
    with pytest.raises(ConfigError, match="made a OrderedDict, but must make a codec"):
        parse("collections:OrderedDict", resolve=Admission(("*",)).fetch)
    assert isinstance(
        parse("torchord.coordinator.compression:TopK:0.1", resolve=Admission(("torchord",)).fetch), Codec
    )


def test_the_table_holds_what_the_documentation_lists() -> None:
    text = PAGE.read_text()
    assert all(f"| `{name}`" in text for name in CODECS)
    assert all(f"`{numbers.name}`" in text for numbers in FORMATS)


def test_encoded_counts_its_bytes() -> None:
    assert Encoded({"w": torch.zeros(3), "b": torch.zeros(2, dtype=torch.int8)}, {}).nbytes == 14
