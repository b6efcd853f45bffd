"""A process whose kernels give other bits than a run's others refuses itself, and names the operator."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.support.control import SPEC
from tests.support.falsified import falsify
from torchord.cache.errors import InvalidInput, Skewed
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.coordinator.compute.self_test import OF_NUMPY, OPERATORS
from torchord.coordinator.runtime import alike
from torchord.coordinator.runtime.context import RunContext
from torchord.coordinator.spec.config import TrainingConfig

CONFIG = TrainingConfig(batch_size=8, shards=2)


@pytest.fixture
def run() -> Callable[..., RunContext]:
    """Makes one process's view of a run: what `RunContext` has."""
    ledger = MemoryLedger(MemoryPlane(), "r")
    ledger.create(SPEC, incarnation="life")

    def context(**spec: Any) -> RunContext:
        made = {"config": CONFIG.to_json(), **spec}
        return cast(
            RunContext,
            SimpleNamespace(run="r", ledger=ledger, config=CONFIG, incarnation="life", spec=made),
        )

    return context


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Any:
    """From the call on this process computes an operator otherwise; before and after the test it does not."""

    def falsified(name: str) -> None:
        monkeypatch.setitem(OPERATORS, name, OPERATORS[name])
        falsify(name)
        alike.kernels.cache_clear()

    yield falsified
    alike.kernels.cache_clear()


def test_like_machines_agree(run: Callable[..., RunContext]) -> None:
    for worker in ("w0", "w1"):
        alike.require_same_kernels(run(), worker)
        alike.compare_kernels(run())
        alike.require_same_kernels(run(), "s0", updates=True)
    assert set(run().ledger.claims()) == {"kernels life", "server kernels life"}


@pytest.mark.parametrize("name", ["matmul", "layer norm", "exp and log"])
def test_one_bit_of_one_operator_is_refused_by_name(
    run: Callable[..., RunContext], wrong: Any, name: str
) -> None:
    alike.require_same_kernels(run(), "w0")
    alike.require_same_kernels(run(), "s0", updates=True)
    wrong(name)
    said = f"like that of worker w0, and this one computes '{name}' with other bits"
    with pytest.raises(Skewed, match=said):
        alike.require_same_kernels(run(), "w1")
    with pytest.raises(Skewed, match=f"computes '{name}' with other bits"):
        alike.compare_kernels(run())


def test_runs_of_before_and_runs_that_admit_anybody_go_on(run: Callable[..., RunContext], wrong: Any) -> None:
    old = {name: value for name, value in CONFIG.to_json().items() if name != "hardware"}
    alike.require_same_kernels(run(), "w0")
    wrong("matmul")
    alike.require_same_kernels(run(config=old), "w1")
    alike.require_same_kernels(run(skew="admit"), "w1")
    with pytest.raises(Skewed):
        alike.require_same_kernels(run(), "w1")


def test_what_numpy_does_is_a_matter_of_the_batches(run: Callable[..., RunContext], wrong: Any) -> None:
    alike.require_same_kernels(run(), "w0")
    wrong(OF_NUMPY)
    alike.require_same_kernels(run(), "w1")


def test_an_operator_that_is_not_what_it_was_a_moment_ago_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter(range(100))
    monkeypatch.setitem(OPERATORS, "erf", lambda: [torch.tensor([float(next(times))])])
    alike.kernels.cache_clear()
    with pytest.raises(InvalidInput, match="computes 'erf' twice and gets unequal bits: look at its memory"):
        alike.kernels()
    alike.kernels.cache_clear()


def test_a_process_that_was_told_too_late_is_no_portable_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """This one has imported torch already, with the kernels of its machine."""
    monkeypatch.setenv("TORCHORD_HARDWARE", "portable")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    alike.kernels.cache_clear()
    with pytest.raises(InvalidInput, match="this process has the kernels of AVX512; start it with TORCH"):
        alike.kernels()
    alike.kernels.cache_clear()
