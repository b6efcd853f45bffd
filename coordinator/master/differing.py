"""Where two runs part: the first step that they took differently, and in it the first shard and tensor.

The ledgers say which step and which shard; which tensor nobody has kept, so this process computes the shard
(or the update) of both runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torchord.cache.errors import TorchordError
from torchord.cache.ledger.records import LedgerEntry

if TYPE_CHECKING:
    from torch import Tensor

    from torchord.coordinator.master.replay import Replay
    from torchord.coordinator.master.run import Run


@dataclass(frozen=True)
class Difference:
    """Where two runs part.

    Attributes:
        same: they do not, as far as both have come.
        compared: the versions that both have, as their first and last; None if there is none.
        step: the first step, from 0, that they took differently; None if there is none.
        shard: the first shard of it whose bytes differ; None where all shards have the same.
        tensor: the first tensor that differs, of the version that the step starts from, of what the shard
            sends, or of the version that the step makes; None if it is not known.
        said: all of it, in sentences.
    """

    same: bool
    compared: tuple[int, int] | None
    step: int | None = None
    shard: int | None = None
    tensor: str | None = None
    said: tuple[str, ...] = ()


def differ(one: Run, other: Run, *, compute: bool = True) -> Difference:
    """Find where two runs part.

    Args:
        one, other: neither needs to be done.
        compute: whether to compute the shard again, for the tensor; needs the recipes' code and data.

    Raises:
        RunNotFound: there is no such run.
    """
    runs = (one, other)
    ledgers = [{entry.version: entry for entry in run._entries(run._ledger.head())} for run in runs]
    found = parted(ledgers[0], ledgers[1], (one.name, other.name))
    if found.step is None or not compute:
        return found
    begins = found.compared is not None and found.step + 1 == found.compared[0]
    try:
        replays = [_replay(run, ledger) for run, ledger in zip(runs, ledgers, strict=True)]
        tensor, said = _in_tensors(replays, found, begins=begins)
    except TorchordError as error:
        return replace(found, said=(*found.said, f"which tensor it is cannot be computed here: {error}"))
    return replace(found, tensor=tensor, said=(*found.said, *said))


def parted(
    one: Mapping[int, LedgerEntry], other: Mapping[int, LedgerEntry], names: tuple[str, str]
) -> Difference:
    """Where two ledgers part, by what they say."""
    versions = sorted(one.keys() & other.keys())
    if not versions:
        return Difference(True, None, said=("they have no step in common",))
    compared = versions[0], versions[-1]
    version = next((v for v in versions if one[v].chain != other[v].chain), None)
    if version is None:
        said = [f"the same bytes from version {compared[0]} to {compared[1]}"]
        lengths = [max(ledger) for ledger in (one, other)]
        if lengths[0] != lengths[1]:
            said.append(f"{names[0]} has {lengths[0]} steps and {names[1]} has {lengths[1]}")
        return Difference(True, compared, said=tuple(said))
    step, a, b = version - 1, one[version], other[version]
    found = Difference(False, compared, step=step)
    said = [f"the first step that differs is step {step}"]
    if len(a.slots) != len(b.slots):
        said.append(f"it has {len(a.slots)} shards in {names[0]} and {len(b.slots)} in {names[1]}")
        return replace(found, said=tuple(said))
    for left, right in zip(a.slots, b.slots, strict=True):
        if left.essence() != right.essence():
            said.append(
                f"the first shard of it that differs is shard {left.shard}: loss {left.loss:.9g} at worker "
                f"{left.worker} and {right.loss:.9g} at {right.worker}"
            )
            if left.examples != right.examples:
                said.append(
                    f"it has {left.examples} examples in {names[0]} and {right.examples} in {names[1]}"
                )
            return replace(found, shard=left.shard, said=tuple(said))
    skipped = [name for name, entry in zip(names, (a, b), strict=True) if entry.skipped]
    said.append("all its shards are the same; what was made of them is not")
    if len(skipped) == 1:
        said.append(f"{skipped[0]} left its update out")
    if a.lr != b.lr:
        said.append(f"learning rates {list(a.lr)} in {names[0]} and {list(b.lr)} in {names[1]}")
    return replace(found, said=tuple(said))


def _replay(run: Run, ledger: Mapping[int, LedgerEntry]) -> Replay:
    from torchord.coordinator.master.replay import Replay
    from torchord.coordinator.master.stored_version import manifest_of
    from torchord.coordinator.master.switching import plan_of

    head, spec = run._ledger.head(), run._spec()
    plan = plan_of(run._ledger, head, spec)
    assert plan is not None, "a run with an entry has a plan"
    return Replay(
        run.recipe(),
        plan,
        run._checkpoints(head.incarnation),
        ledger,
        started_elsewhere="start_from" in spec or "fork" in spec,
        manifest=manifest_of(run._ledger),
    )


def _in_tensors(
    replays: list[Replay], found: Difference, *, begins: bool
) -> tuple[str | None, tuple[str, ...]]:
    """(the first tensor that differs, what there is to say of it).

    Args:
        begins: whether the ledgers do not say that the step starts from the same version.
    """
    assert found.step is not None
    step, shard = found.step, found.shard
    if begins and (first := _first(lambda replay: replay.starting(step), replays)) is not None:
        return first[0], (f"it starts from other weights: {first[1]}",)
    if shard is None:
        first = _first(lambda replay: replay.ending(step), replays)
        return (None, ()) if first is None else (first[0], (f"of what the step makes, {first[1]}",))
    first = _first(lambda replay: replay.sent(step, shard), replays)
    if first is not None:
        return first[0], (f"of what the shard sends, {first[1]}",)
    unlike = [problem for replay in replays for problem in replay.unlike(step, shard)]
    return None, ("computed here, both runs' shard has the same bytes", *unlike)


def _first(read: Callable[[Replay], Mapping[str, Tensor]], replays: list[Replay]) -> tuple[str, str] | None:
    """The first tensor in which two runs differ, and how."""
    import torch

    from torchord.coordinator.compute.model_state import same_bytes

    one, other = (dict(read(replay)) for replay in replays)
    for name, tensor in one.items():
        if name not in other:
            return name, f"tensor {name!r} is in the first run only"
        rival = other[name]
        if (tensor.shape, tensor.dtype) != (rival.shape, rival.dtype):
            shapes = f"{tuple(tensor.shape)} {tensor.dtype} and {tuple(rival.shape)} {rival.dtype}"
            return name, f"tensor {name!r} differs in kind: {shapes}"
        if not same_bytes(tensor.contiguous(), rival.contiguous()):
            wide = torch.complex128 if tensor.is_complex() else torch.float64
            apart = (tensor.to(wide) - rival.to(wide)).abs()
            return name, (
                f"the first tensor that differs is {name!r}, in {int((apart != 0).sum())} of {apart.numel()} "
                f"values, by at most {float(apart.max()):.3g}"
            )
    return next(
        ((name, f"tensor {name!r} is in the second run only") for name in other if name not in one), None
    )
