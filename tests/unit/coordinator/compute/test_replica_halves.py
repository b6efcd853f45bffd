"""A replica whose version comes in two halves: writes are put back, and none reaches what is shared."""

from __future__ import annotations

import pytest
import torch

from tests.support import resting
from tests.support.inprocess import resolved
from torchord import TrainingConfig
from torchord.cache.errors import ManifestMismatch
from torchord.cache.tensors.codec import pack
from torchord.cache.tensors.halves import Halves, Rest, VersionBytes
from torchord.coordinator.compute.replica import Replica


def made(*more: str) -> tuple[Replica, torch.Tensor, Rest]:
    """A replica, its version in one piece, and what rests of it: what may, and other tensors."""
    replica = Replica.build(resolved(resting.recipe()), TrainingConfig(batch_size=8))
    flat = replica.pack()
    halves = Halves.of(replica.manifest, {*replica.may_rest(), *more})
    tensors = replica.state_tensors()
    layout = halves.resting_layout
    return (
        replica,
        flat,
        Rest(halves, "", pack({spec.name: tensors[spec.name] for spec in layout.tensors}, layout)),
    )


def loaded(replica: Replica) -> torch.Tensor:
    """The version that a replica holds, in one piece."""
    assert replica.flat is not None
    return VersionBytes(replica.flat, replica.rest).flat()


def test_writes_are_put_back_and_reach_nothing_that_is_shared() -> None:
    replica, flat, rest = made()
    shared = rest.buffer.clone()
    replica.attach(rest.halves.parted(flat), rest)
    with torch.no_grad():
        replica.parameters["0.base.weight"].add_(1)
        replica.parameters["0.base.bias"].data.mul_(2)
        replica.buffers["table"].fill_(3)
    assert set(replica.changed_buffers()) == {"0.base.weight", "table"}
    replica.attach(rest.halves.parted(flat), rest)
    assert torch.equal(replica.pack(), flat) and torch.equal(rest.buffer, shared)
    replica.own()
    replica.load(rest.halves.parted(flat), rest)
    assert torch.equal(replica.pack(), flat) and torch.equal(loaded(replica), flat)


def test_from_one_piece_to_two_and_back() -> None:
    replica, flat, rest = made()
    other = flat.clone()
    for _ in range(2):
        replica.attach(rest.halves.parted(flat), rest)
        assert replica.rest is rest and torch.equal(replica.pack(), flat)
        assert replica.landing(rest.halves.moving_layout.nbytes) is replica.flat
        assert replica.landing(flat.numel()) is None
        replica.attach(other)
        assert replica.rest is None and torch.equal(loaded(replica), other)
        assert torch.equal(replica.pack(), flat)


def test_what_is_trained_is_never_attached_to_what_is_shared() -> None:
    replica, flat, rest = made("0.down")
    shared = rest.buffer.clone()
    replica.attach(rest.halves.parted(flat), rest)
    with torch.no_grad():
        for parameter in replica.parameters.values():
            parameter.add_(1)
    assert torch.equal(rest.buffer, shared)
    replica.attach(rest.halves.parted(flat), rest)
    assert torch.equal(replica.pack(), flat)


def test_a_half_of_another_length_is_refused() -> None:
    replica, flat, rest = made()
    with pytest.raises(ManifestMismatch, match="other code than this worker's"):
        replica.load(flat, rest)
