"""What goes to a device and comes back: in which order, with how many waits, and with which bytes.

The device is a stand-in that does each copy as late as it may (`tests.support.stand_in`); what needs a
GPU is in tests/acceptance/test_cuda.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from billiard.process import current_process

from tests.support import models, resting
from tests.support.inprocess import InProcess, resolved
from tests.support.stand_in import StandIn
from torchord import Recipe, TrainingConfig
from torchord.cache.errors import InvalidInput
from torchord.cache.tensors import pinned
from torchord.cache.tensors.codec import layout, pack, views
from torchord.cache.tensors.halves import Halves, Rest
from torchord.coordinator.compute import determinism, device_memory, gradient
from torchord.coordinator.compute import inner_steps as local_steps
from torchord.coordinator.compute.batch import open_dataset
from torchord.coordinator.compute.device_memory import DeviceMemory
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.messages.task_names import QUEUES
from torchord.coordinator.runtime import environment as environments
from torchord.coordinator.runtime.environment import environment
from torchord.coordinator.spec.plan import Plan
from torchord.tasks import worker

CONFIG = TrainingConfig(batch_size=8, shards=4, seed=3)
RECIPES = {"mlp": models.mlp, "cnn": models.cnn, "gpt": models.gpt, "odd": models.odd}


def some_bytes(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def state() -> dict[str, torch.Tensor]:
    return {"w": torch.randn(3, 5).t(), "n": torch.tensor(7), "h": torch.randn(4).half(), "b": torch.ones(1)}


# --- versions ---------------------------------------------------------------------------


def test_a_version_is_copied_once_and_nobody_waits() -> None:
    copies = StandIn()
    memory = DeviceMemory(copies)
    source = copies.host(1000).copy_(some_bytes(1000))
    assert torch.equal(memory.upload(source), source)
    assert copies.log == ["after compute", "copy", "mark", "before compute"]


def test_the_next_version_takes_the_place_of_the_last() -> None:
    copies = StandIn()
    memory = DeviceMemory(copies)
    first = memory.upload(copies.host(100).copy_(some_bytes(100)))
    second = memory.upload(copies.host(100).copy_(some_bytes(100, 1)))
    assert first.data_ptr() == second.data_ptr() and torch.equal(second, some_bytes(100, 1))


@pytest.mark.parametrize("pieces", [0.5, 1, 3.7, 4, 9.2])
def test_pageable_bytes_pass_through_pieces(pieces: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece is written to again only when its copy is done: the stand-in would copy other bytes."""
    monkeypatch.setattr(device_memory, "STAGE_NBYTES", 1000)
    copies = StandIn()
    source = some_bytes(int(pieces * 1000))
    kept = source.clone()
    found = DeviceMemory(copies).upload(source)
    assert torch.equal(found, kept)
    needed = -(-len(source) // 1000)
    assert copies.log.count("copy") == needed
    assert copies.waits == max(0, needed - device_memory.STAGES), "each for a piece's own copy, long done"


def test_pageable_bytes_may_change_once_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "STAGE_NBYTES", 1000)
    copies = StandIn()
    memory, source = DeviceMemory(copies), some_bytes(3000)
    kept, flush = source.clone(), copies.flush
    monkeypatch.setattr(copies, "before_compute", lambda: None)
    found = memory.upload(source)
    source.zero_()
    flush()
    assert torch.equal(found, kept)


def test_a_landing_is_used_again_once_its_upload_is_done() -> None:
    copies = StandIn()
    memory = DeviceMemory(copies)
    landing = memory.landing(100, None)
    memory.upload(landing)
    assert copies.waits == 0
    assert memory.landing(100, landing).data_ptr() == landing.data_ptr()
    assert copies.waits == 1
    mapped = some_bytes(100)
    assert memory.landing(100, mapped).data_ptr() != mapped.data_ptr(), "pageable"
    assert memory.landing(200, landing).numel() == 200


# --- tensors ----------------------------------------------------------------------------


def test_tensors_leave_by_one_copy_and_one_wait() -> None:
    copies, tensors = StandIn(), state()
    found = DeviceMemory(copies).gather(tensors)
    assert copies.log == ["after compute", "copy", "mark", "wait"]
    assert torch.equal(found, pack(tensors, layout(tensors))), "the gaps too"


def test_gathered_bytes_are_the_callers() -> None:
    memory = DeviceMemory(StandIn())
    first = memory.gather({"w": torch.ones(4)})
    memory.gather({"w": torch.zeros(4), "more": torch.zeros(400)})
    assert torch.equal(first.view(torch.float32)[:4], torch.ones(4))


def test_tensors_arrive_by_one_copy_and_nobody_waits() -> None:
    copies, tensors = StandIn(), state()
    memory = DeviceMemory(copies)
    found = memory.scatter(tensors)
    assert copies.log == ["after compute", "copy", "before compute"]
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    again = memory.scatter({"w": tensors["w"]})
    assert torch.equal(again["w"], tensors["w"])


def test_without_page_locked_memory_the_bytes_are_the_same() -> None:
    copies, tensors, source = StandIn(pins=False), state(), some_bytes(5000)
    memory = DeviceMemory(copies)
    assert torch.equal(memory.upload(source), source)
    assert copies.log.count("copy") == 1, "no pieces: they would only be one more copy"
    assert torch.equal(memory.gather(tensors), pack(tensors, layout(tensors)))


def test_refused_page_locked_memory_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refused = 0

    def empty(*sizes: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        nonlocal refused
        if pin_memory:
            refused += 1
            raise RuntimeError("CUDA error: out of memory\nand much more")
        return made(*sizes, **more)

    made = torch.empty
    monkeypatch.setattr(pinned, "_refused", False)
    monkeypatch.setattr(torch, "empty", empty)
    with caplog.at_level(logging.WARNING):
        assert [pinned.host_memory(size).numel() for size in (3, 4, 5)] == [3, 4, 5]
    assert refused == 1
    [record] = caplog.records
    assert "ulimit -l" in record.getMessage() and "much more" not in record.getMessage()
    batch = torch.ones(2)
    assert pinned.pinned_copy(batch) is batch


# --- the model's half -------------------------------------------------------------------


def replica_of(recipe: Recipe, config: TrainingConfig, copies: StandIn | None = None) -> Replica:
    replica = Replica.build(resolved(recipe), config)
    version = replica.pack()
    if copies is not None:
        replica.use(DeviceMemory(copies))
    replica.attach(version)
    return replica


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_gradient_has_the_same_bits_and_costs_one_wait(name: str, precision: str) -> None:
    config = TrainingConfig(batch_size=8, shards=4, seed=3, precision=precision)
    recipe, copies = RECIPES[name](), StandIn()
    found = resolved(recipe)
    data = open_dataset(found, config)
    plan = Plan(len(data), config)
    there, here = replica_of(recipe, config, copies), replica_of(recipe, config)
    for shard in (2, 0):
        copies.log.clear()
        indices = plan.indices(0, shard)
        one, other = (gradient.compute(r, found, config, data, indices, 0, shard) for r in (there, here))
        assert copies.log == ["after compute", "copy", "mark", "wait"]
        same_gradients(one, other)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_local_steps_have_the_same_bits_and_cost_one_wait(precision: str) -> None:
    config = TrainingConfig(
        batch_size=8, shards=2, seed=3, local_steps=2, clip_norm=0.5, precision=precision,
    )  # fmt: skip
    recipe = models.cnn(optimizer=partial(torch.optim.AdamW, lr=1e-3))
    found, copies = resolved(recipe), StandIn()
    data = open_dataset(found, config)
    parts = Plan(len(data), config).parts(0, 1)
    replicas = replica_of(recipe, config, copies), replica_of(recipe, config)
    copies.log.clear()
    for before in (None, "again"):
        states = [None, None] if before is None else [taken.state for taken in (one, other)]  # noqa: F821
        one, other = (
            local_steps.compute(replica, found, config, data, parts, 0, 1, kept)
            for replica, kept in zip(replicas, states, strict=True)
        )
        same_gradients(one.gradient, other.gradient)
    assert copies.log == ["after compute", "copy", "mark", "wait"] * 2
    moments = [taken.state["optimizer"]["state"][0]["exp_avg"] for taken in (one, other)]
    assert torch.equal(*moments)


def test_a_version_in_two_halves_has_the_same_bits() -> None:
    """What rests goes to the device once; what moves lands and is uploaded as ever."""
    found, config, copies = resolved(resting.recipe()), CONFIG, StandIn()
    data = open_dataset(found, config)
    indices = Plan(len(data), config).indices(0, 0)
    one, other = (Replica.build(found, config) for _ in range(2))
    halves = Halves.of(one.manifest, one.may_rest())
    beside = {spec.name: one.state_tensors()[spec.name] for spec in halves.resting_layout.tensors}
    rest = Rest(halves, "", pack(beside, halves.resting_layout))
    one.use(DeviceMemory(copies))
    for seed in range(3):
        with torch.no_grad():
            for parameter in other.parameters.values():
                if parameter.requires_grad:
                    parameter.add_(0.01 * seed)
        flat = other.pack()
        landing = one.landing(halves.moving_layout.nbytes)
        assert landing is not None
        one.attach(landing.copy_(halves.parted(flat)), rest)
        other.attach(flat)
        assert torch.equal(one.pack(), flat)
        same_gradients(*(gradient.compute(r, found, config, data, indices, 0, 0) for r in (one, other)))
        other.own()


def same_gradients(one: gradient.ShardGradient, other: gradient.ShardGradient) -> None:
    assert list(one.gradients) == list(other.gradients) and list(one.buffers) == list(other.buffers)
    for some, others in ((one.gradients, other.gradients), (one.buffers, other.buffers)):
        assert all(torch.equal(bits(some[name]), bits(others[name])) for name in some)
    assert (one.loss, one.grad_norm, one.finite) == (other.loss, other.grad_norm, other.finite)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("name", RECIPES)
def test_a_whole_run_has_the_same_bits(name: str) -> None:
    """Clients and training server with device memory of their own."""
    ours, theirs = (InProcess(resolved(RECIPES[name]()), CONFIG, clients=2) for _ in range(2))
    for replica in (ours.trainer.replica, *ours.replicas):
        replica.use(DeviceMemory(StandIn()))
    assert ours.train().bits == theirs.train().bits
    assert ours.losses == theirs.losses


def test_an_update_waits_for_the_norm_and_for_the_new_version_alone() -> None:
    copies = StandIn()
    trainer = Trainer.build(resolved(models.mlp()), CONFIG)
    trainer.replica.use(DeviceMemory(copies))
    gradients = {name: torch.ones_like(p) for name, p in trainer.replica.parameters.items()}
    trainer.apply(gradients, {}, step=0, loss=1.0)
    assert copies.log == ["after compute", "copy", "before compute"]
    copies.log.clear()
    out = torch.empty(trainer.replica.nbytes(), dtype=torch.uint8)
    assert trainer.replica.pack(out) is out
    assert copies.log == ["after compute", "copy", "mark", "wait"]
    found = views(out, trainer.replica.manifest)
    assert all(torch.equal(found[name], p) for name, p in trainer.replica.parameters.items())


def test_a_write_to_a_parameter_is_undone_from_the_device() -> None:
    copies = StandIn()
    replica = replica_of(models.mlp(), CONFIG, copies)
    name, parameter = next(iter(replica.parameters.items()))
    with torch.no_grad():
        parameter.add_(1)
    copies.log.clear()
    replica.reset_buffers()
    assert torch.equal(parameter, replica.version_tensors[name]) and not copies.log


# --- determinism ------------------------------------------------------------------------


def test_a_cublas_that_was_set_up_before_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(determinism, "_late", True)
    with pytest.raises(InvalidInput, match=r"before torchord was imported.*CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        determinism.require_cublas()


@pytest.mark.parametrize(
    ("value", "allowed"), [(":4096:8", True), (":16:8", True), (":0:0", False), ("", False)]
)
def test_only_deterministic_workspaces_are_accepted(
    value: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(determinism, "_late", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
    if allowed:
        determinism.require_cublas()
    else:
        with pytest.raises(InvalidInput, match="deterministic=False"):
            determinism.require_cublas()


# --- devices ----------------------------------------------------------------------------


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch says that there are two, and the process has chosen none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(environments, "_device", None)
    before = (worker._node, worker._queues)
    worker._queues = QUEUES
    yield
    worker._node, worker._queues = before


@pytest.mark.parametrize(
    ("asked", "index", "device"),
    [
        ("auto", 0, "cuda:0"),
        ("auto", 1, "cuda:1"),
        ("cuda", 3, "cuda:1"),
        ("cuda:0", 1, "cuda:0"),
        ("cpu", 1, "cpu"),
    ],
)
def test_child_i_of_a_prefork_pool_takes_device_i(
    asked: str, index: int, device: str, two_devices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "settings", replace(worker.settings, device=asked))
    monkeypatch.setattr(current_process(), "index", index, raising=False)
    environments.set_device(asked)
    worker._child_started("node@host")
    assert environments.device() == device


def test_the_parent_of_a_pool_does_not_ask_for_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: Any) -> None:
        raise AssertionError("CUDA would not survive the fork")

    for name in ("is_available", "device_count", "init", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, touched)
    monkeypatch.setattr(environments, "_device", None)
    monkeypatch.setattr("gc.freeze", lambda: None)  # this process has garbage of its own
    worker._preload(SimpleNamespace(app=worker.app))


@pytest.mark.parametrize(("workspace", "shown"), [(":4096:8", "a GPU"), (":16:8", "a GPU, cuBLAS :16:8")])
def test_the_environment_names_the_gpu_and_unusual_workspaces(
    workspace: str, shown: str, two_devices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments.set_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda kind: "a GPU")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    assert f", cuda {shown}, " in environment()


def test_switches_of_a_gpu_are_set_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a computation in a process that belongs to somebody else."""
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(determinism, "_late", False)
    matmul = torch.backends.cuda.matmul
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert torch.backends.cudnn.allow_tf32, "torch's default"
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        with determinism.pinned(1, True, "cuda", restore=True):
            assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
            assert not torch.backends.cudnn.allow_tf32 and not matmul.allow_tf32
            assert matmul.allow_bf16_reduced_precision_reduction
        assert torch.backends.cudnn.benchmark and torch.backends.cudnn.allow_tf32
        assert not matmul.allow_bf16_reduced_precision_reduction
    finally:
        matmul.allow_bf16_reduced_precision_reduction = True
