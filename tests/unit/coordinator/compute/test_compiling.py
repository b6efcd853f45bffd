"""Compiled and channels-last shards: the same bits whatever was before; no compiler is a clear no."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import models
from tests.support.inprocess import InProcess, resolved, same
from torchord.cache.errors import CompilerMissing, Skewed
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.coordinator.compute import compiling, gradient, inference
from torchord.coordinator.compute.batch import formatted, open_dataset
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.runtime.environment import environment
from torchord.coordinator.spec.config import TrainingConfig

pytestmark = [
    # torch's own imports: torch.utils.mkldnn is still written with torch.jit.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    # torch tells how fast it is on Python 3.13.0 (python/cpython#125608).
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"),
]

Gradients = dict[str, torch.Tensor]


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"epochs": 2, "batch_size": 8, "shards": 2, "seed": 3, **changes})


def gradients(how: TrainingConfig, sizes: Sequence[int]) -> list[Gradients]:
    """Of shards of these sizes, computed one after the other by a replica of their own."""
    given = resolved(models.cnn())
    replica = Replica.build(given, how, computing=True)
    replica.load(replica.pack())
    data = open_dataset(given, how)
    return [gradient.compute(replica, given, how, data, range(n), 0, 0).gradients for n in sizes]


# --- channels last -------------------------------------------------------------------------------


def test_channels_last_is_where_shards_are_computed_only() -> None:
    given, how = resolved(models.cnn()), config(memory_format="channels_last")
    computing = Replica.build(given, how, computing=True)
    four = [p for p in computing.parameters.values() if p.dim() == 4]
    assert four and all(p.is_contiguous(memory_format=torch.channels_last) for p in four)
    assert any(not p.is_contiguous() for p in four)
    plain = Trainer.build(given, how).replica
    assert all(p.is_contiguous() for p in plain.parameters.values())
    assert torch.equal(plain.pack(), computing.pack()), "a version's bytes know no memory format"
    assert plain.manifest == computing.manifest


def test_channels_last_gradients_are_those_of_contiguous_ones() -> None:
    [last], [plain] = gradients(config(memory_format="channels_last"), [6]), gradients(config(), [6])
    assert last.keys() == plain.keys()
    for name, value in last.items():
        torch.testing.assert_close(value.contiguous(), plain[name], rtol=1e-4, atol=1e-6)
    again = gradients(config(memory_format="channels_last"), [3, 6])[1]
    assert all(same(value, last[name]) for name, value in again.items())


def test_only_pictures_are_reordered() -> None:
    how = config(memory_format="channels_last")
    pictures, counts = torch.rand(2, 3, 4, 4), torch.ones(2, 3, 4, 4, dtype=torch.int64)
    batch = {"x": [pictures, (counts, torch.rand(2, 3))], "y": "text"}
    found = formatted(batch, how)
    assert found["x"][0].is_contiguous(memory_format=torch.channels_last) and found["y"] == "text"
    assert found["x"][1][0] is counts and torch.equal(found["x"][0], pictures)
    assert formatted(batch, config()) is batch


def test_an_inner_optimizers_state_keeps_its_order_in_memory() -> None:
    """A state that came back from the store is contiguous, a fresh one has the parameter's order."""
    from torchord.coordinator.compute.optimizers import build_optimizer
    from torchord.coordinator.compute.trainer import restore_optimizer

    given, how = resolved(models.cnn()), config(memory_format="channels_last")
    replica = Replica.build(given, how, computing=True)
    optimizers = [build_optimizer(given, how, replica) for _ in range(2)]
    for parameter in replica.parameters.values():
        parameter.grad = torch.rand_like(parameter)
    optimizers[0][0].step()
    scheduler = optimizers[0][1]
    saved = {
        "optimizer": optimizers[0][0].state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
    }
    for values in saved["optimizer"]["state"].values():
        values.update({k: v.contiguous() for k, v in values.items() if isinstance(v, torch.Tensor)})
    restore_optimizer(*optimizers[1], saved)
    for parameter, values in optimizers[1][0].state.items():
        for value in values.values():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                assert value.stride() == parameter.stride()


# --- compiled ------------------------------------------------------------------------------------


@pytest.fixture
def toolchain() -> str:
    """This machine's; skips, in so many words, where there is none."""
    try:
        return compiling.toolchain("cpu")
    except CompilerMissing as error:
        pytest.skip(f"NOT TESTED, no C++ compiler here: {error}")


@pytest.fixture
def no_compiler() -> Iterator[None]:
    """A machine on which no program named like a compiler is."""
    import torch._inductor.config as inductor
    from torch._inductor import cpp_builder

    def forget() -> None:
        compiling.toolchain.cache_clear()
        cpp_builder.cpp_compiler_search.cache_clear()

    forget()
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}):
        yield
    forget()


@pytest.mark.slow
def test_compiled_bits_depend_on_no_history(
    toolchain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = config(compile=True)
    first = gradients(how, [3, 6, 4])
    torch._dynamo.reset()
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing of the above
    second = gradients(how, [4, 3])
    for one, other in ((first[2], second[0]), (first[0], second[1])):
        assert one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    eager = gradients(config(), [3])[0]
    for name, value in first[0].items():
        torch.testing.assert_close(value, eager[name], rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2, "nothing was compiled"


def test_a_server_and_an_evaluation_need_no_compiler(no_compiler: None) -> None:
    given, how = resolved(models.cnn()), config(compile=True)
    assert Trainer.build(given, how).replica.compiled is None
    replica = Replica.build(given, how, computing=True)
    replica.load(replica.pack())
    found = inference.evaluate(replica, given, how, open_dataset(given, how), range(4))
    assert found.examples == 4 and found.means["loss"] > 0


def test_a_missing_compiler_is_one_clear_error(no_compiler: None) -> None:
    with pytest.raises(CompilerMissing, match=r"(?s)no compiler that it can use for cpu .*apt install g\+\+"):
        compiling.toolchain("cpu")
    assert issubclass(CompilerMissing, Skewed), "a worker leaves such a run to others"


def test_the_toolchain_names_compiler_and_instructions(toolchain: str) -> None:
    assert any(character.isdigit() for character in toolchain) and "\n" not in toolchain
    assert environment(toolchain) == f"{environment()}, {toolchain}"


def test_the_first_toolchain_is_the_runs() -> None:
    ledger = MemoryLedger(MemoryPlane(), "run")
    assert ledger.claim_toolchain("g++ 12") == "g++ 12", "a run that is gone"
    ledger.create({"recipe": {}, "config": {}}, incarnation="life")
    assert [ledger.claim_toolchain(name) for name in ("g++ 12", "clang 17", "g++ 12")] == ["g++ 12"] * 3


def test_a_plain_run_asks_for_no_toolchain() -> None:
    ours = InProcess(resolved(models.mlp()), config()).train(0, 1)
    assert ours.replicas[0].compiled is None
