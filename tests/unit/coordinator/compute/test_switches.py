"""Whatever modules and other runs have left of torch's switches, a run computes with torch's own."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import models
from tests.support.inprocess import InProcess, resolved
from torchord import TrainingConfig
from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.compute.switches import put_back_switches, read_switches, set_switches

CONFIG = TrainingConfig(epochs=1, batch_size=8, shards=2, seed=3)
_C: Any = torch._C


class Doubled(TorchFunctionMode):
    """Doubles what every linear layer gives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return found * 2 if func is nn.functional.linear else found


class Counted(TorchDispatchMode):
    """Doubles every product of matrices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return found * 2 if "mm" in str(func) else found


def newer(backend: str, operation: str, value: str) -> Callable[[], None]:
    if not hasattr(_C, "_set_fp32_precision_setter"):
        return lambda: torch.set_float32_matmul_precision("medium")
    return lambda: _C._set_fp32_precision_setter(backend, operation, value)


LEFT: dict[str, Callable[[], Any]] = {
    "gradients off": lambda: torch.set_grad_enabled(False),
    "inference mode": lambda: torch.inference_mode().__enter__(),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
    "default device": lambda: torch.set_default_device("meta"),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "function mode": lambda: Doubled().__enter__(),
    "dispatch mode": lambda: Counted().__enter__(),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "no oneDNN": lambda: _C._set_mkldnn_enabled(False),
    "precision of matmul": newer("mkldnn", "matmul", "bf16"),
    "precision of all": newer("generic", "all", "tf32"),
    "precision, older": lambda: torch.set_float32_matmul_precision("medium"),
    "attention": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "fast path": lambda: torch.backends.mha.set_fastpath_enabled(False),
}


@contextmanager
def in_a_thread_of_its_own() -> Iterator[list[Callable[[], None]]]:
    """What is appended is run in one new thread, since a thread's modes end with it."""
    tasks: list[Callable[[], None]] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for task in tasks:
                task()
        except BaseException as error:  # noqa: BLE001 - raised again by the test
            failed.append(error)

    yield tasks
    before = read_switches(), torch.get_default_dtype()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    put_back_switches(before[0])
    torch.set_default_dtype(before[1])
    if failed:
        raise failed[0]


@functools.cache
def untouched() -> bytes:
    """One step's bits in a process that nobody has touched."""
    return InProcess(resolved(models.cnn()), CONFIG).train(stop=1).bits


def during_a_shard(change: Callable[[], Any]) -> None:
    """What the code of another run does in the same thread."""
    with pinned(1, True):
        change()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("where", ["a shard", "the thread"])
def test_a_run_has_the_same_bits_whatever_another_has_left(name: str, where: str) -> None:
    if (name, where) == ("default device", "the thread"):
        where = "a shard"  # an import's is put back with the import
    found: list[bytes] = []
    made: list[InProcess] = []
    change = LEFT[name]
    with in_a_thread_of_its_own() as tasks:
        tasks.append(lambda: made.append(InProcess(resolved(models.cnn()), CONFIG)))
        tasks.append(change if where == "the thread" else lambda: during_a_shard(change))
        tasks.append(lambda: found.append(made[0].train(stop=1).bits))
    assert found == [untouched()]


@pytest.mark.parametrize("name", LEFT)
def test_building_under_them_and_putting_them_back(name: str) -> None:
    expected = InProcess(resolved(models.mlp()), CONFIG).bits
    found: list[Any] = []
    with in_a_thread_of_its_own() as tasks:
        tasks.append(LEFT[name])
        tasks.append(lambda: found.append(state()))
        tasks.append(lambda: found.append(InProcess(resolved(models.mlp()), CONFIG).trainer))
        tasks.append(lambda: found.append(state()))
    before, trainer, after = found
    assert before == after
    with torch.inference_mode(False):
        assert bytes(trainer.replica.pack().numpy()) == expected


def state() -> tuple[Any, ...]:
    return (
        read_switches(),
        torch.is_inference_mode_enabled(),
        getattr(torch.get_default_device(), "type", None),
        torch.get_default_dtype(),
        [type(mode) for mode in torch.overrides._get_current_function_mode_stack()],
        _C._len_torch_dispatch_stack(),
    )


def test_the_switches_that_are_set_are_those_of_a_fresh_torch() -> None:
    """Else pinning would change what an untouched process computes."""
    before = read_switches()
    set_switches()
    assert read_switches() == before


def test_gradients_stay_off_for_whoever_has_them_off() -> None:
    with torch.no_grad():
        with pinned(1, True):
            assert torch.is_grad_enabled()
        assert not torch.is_grad_enabled()


def test_modes_stay_in_their_order() -> None:
    inner, outer = Doubled(), Doubled()
    with torch.device("meta"), outer, inner:
        with pinned(1, True):
            assert torch.zeros(1).device.type == "cpu"
        assert torch.overrides._get_current_function_mode_stack()[-2:] == [outer, inner]
        found: Tensor = torch.zeros(1)
        assert found.device.type == "meta"
    assert _C._len_torch_function_stack() == 0
