"""A layout in two halves: the same tensors, the same checksums over the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchord.cache.errors import ManifestMismatch
from torchord.cache.tensors.codec import as_bytes, layout, pack, same_bits
from torchord.cache.tensors.halves import ChunkSums, Halves, Rest, VersionBytes
from torchord.cache.tensors.pieces import checksums, split


def state() -> dict[str, Tensor]:
    """Tensors of every kind of length and layout: gaps between them, none at all, several chunks long."""
    generator = torch.Generator().manual_seed(1)
    return {
        "w": torch.randn(30, 20, generator=generator),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "columns": torch.randn(5, 9, generator=generator).T,
        "channels": torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last),
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(33, generator=generator).bfloat16(),
        "complex": torch.randn(4, dtype=torch.complex64, generator=generator).conj(),
        "nan": torch.tensor([float("nan"), -0.0], dtype=torch.float64),
    }


RESTING = [[], ["w"], ["empty", "nan"], ["scalar", "columns", "half"], [n for n in state() if n != "flags"]]


@pytest.mark.parametrize("resting", RESTING, ids=str)
def test_two_halves_hold_what_one_buffer_holds(resting: list[str]) -> None:
    tensors = state()
    whole = layout(tensors)
    flat = pack(tensors, whole)
    halves = Halves.of(whole, resting)
    assert [spec.name for spec in halves.resting_layout.tensors] == [n for n in tensors if n in resting]
    beside = halves.resting_layout
    buffer = pack({name: tensors[name] for name in tensors if name in resting}, beside)
    rest = Rest(halves, "d", buffer)
    own = halves.parted(flat)
    assert own.numel() + buffer.numel() == flat.numel()
    assert torch.equal(VersionBytes(own, rest).flat(), flat)
    assert all(same_bits(rest.tensors[name], tensors[name].contiguous()) for name in resting)
    assert Halves(whole, halves.resting) == halves
    assert rest.is_of("d", halves.resting)
    assert not rest.is_of("e", halves.resting) and not rest.is_of("d", halves.resting ^ 1)


def test_a_version_in_one_piece_is_its_own_buffer() -> None:
    flat = torch.zeros(64, dtype=torch.uint8)
    assert VersionBytes(flat).flat() is flat


def test_bytes_of_another_model_are_refused() -> None:
    halves = Halves.of(layout(state()), ["w"])
    lengths = halves.moving_layout.nbytes, halves.resting_layout.nbytes
    halves.require_lengths(*lengths)
    for wrong in ((lengths[0] + 64, lengths[1]), (lengths[0], 0), lengths[::-1]):
        with pytest.raises(ManifestMismatch, match=f"{wrong[0]} bytes that move and {wrong[1]} that rest"):
            halves.require_lengths(*wrong)
    with pytest.raises(ManifestMismatch):  # a tensor that the layout does not have
        Halves(halves.whole, halves.resting | 1 << 20).require_lengths(*lengths)


@pytest.mark.parametrize("chunk_nbytes", [64, 96, 1000, 1 << 20])
def test_checksums_of_a_buffer_that_is_nowhere(chunk_nbytes: int) -> None:
    """They are those of the packed buffer, at first and after some tensors have changed."""
    tensors = state()
    manifest = layout(tensors)
    sums = ChunkSums(manifest, chunk_nbytes)

    def packed() -> tuple[str, ...]:
        return checksums(split(as_bytes(pack(tensors, manifest)), chunk_nbytes))

    assert sums.after(tensors, ()) == packed()
    for names in (["scalar"], ["w", "nan"], ["columns", "channels", "complex"], []):
        for name in names:
            tensors[name] = tensors[name].roll(1, 0) + 1 if tensors[name].dim() else tensors[name] + 1
        assert sums.after(tensors, names) == packed(), names


def test_what_did_not_change_is_not_read() -> None:
    """A chunk without a byte that may have changed keeps its checksum."""
    tensors = {"a": torch.zeros(16), "b": torch.zeros(16)}  # 64 bytes each
    sums = ChunkSums(layout(tensors), 64)
    first = sums.after(tensors, ())
    tensors["a"] += 1
    assert sums.after(tensors, ["b"]) == first
    assert sums.after(tensors, ["a"])[0] != first[0]
