"""On a GPU: the bits of a plain loop on it, one wait a shard, page-locked buffers, prefork's devices.

Skipped where there is none. What of it can be checked without is in
tests/unit/coordinator/compute/test_device_memory.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.support import models, recipes_more, reference
from tests.support.fleet import Fleet, fleet
from tests.support.inprocess import resolved
from torchord import Recipe, TrainingConfig
from torchord.cache.tensors.codec import layout, pack
from torchord.coordinator.compute import gradient
from torchord.coordinator.compute import inner_steps as local_steps
from torchord.coordinator.compute.batch import open_dataset
from torchord.coordinator.compute.device_memory import STAGE_NBYTES, STAGES, CudaCopies, DeviceMemory
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.spec.plan import Plan

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

DEVICE = "cuda:0"


class Case(NamedTuple):
    """A recipe, its config, and the loop that it is compared with; each n_k / N is a power of two."""

    recipe: Recipe
    config: TrainingConfig
    loop: Callable[..., reference.Reference]


def _config(**changes: object) -> TrainingConfig:
    return TrainingConfig(**{"epochs": 2, "batch_size": 8, "shards": 4, "seed": 3, **changes})  # type: ignore[arg-type]


CASES = {
    "mlp with dropout": Case(models.mlp(), _config(), reference.accumulate),
    "cnn with BatchNorm and augmentation": Case(models.cnn(32), _config(), reference.accumulate),
    "gpt with tied embeddings, AdamW, clipping": Case(
        recipes_more.tied_gpt(size=32), _config(clip_norm=0.5), reference.accumulate
    ),
    "bfloat16 autocast": Case(models.gpt(32), _config(precision="bf16"), reference.average),
    "float16 autocast, with overflows": Case(
        models.gpt(32), _config(precision="fp16", loss_scale_interval=2), reference.average
    ),
}


@contextmanager
def _exact_products() -> Iterator[None]:
    """For the reference: convolutions without TF32, as torchord computes them."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet whose processes, the training server's too, compute on the first GPU."""
    with fleet(tmp_path_factory.mktemp("cuda"), workers=1, env={"TORCHORD_DEVICE": DEVICE}) as one:
        yield one


@pytest.mark.filterwarnings("ignore:.*TF32.*:UserWarning")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("workers", [1, 2])
def test_the_bits_of_a_plain_loop_on_the_gpu(on_gpu: Fleet, workers: int, case: str) -> None:
    recipe, config, loop = CASES[case]
    on_gpu.resize(workers)
    run, trained = on_gpu.train(recipe, config, f"{list(CASES).index(case)}-{workers}")
    with _exact_products():
        expected = loop(recipe, config, device=DEVICE)
    assert reference.bits(trained.module) == expected.bits
    assert run.verify().ok


# --- copies -----------------------------------------------------------------------------


def test_buffers_are_page_locked() -> None:
    copies = CudaCopies(torch.device(DEVICE))
    memory = DeviceMemory(copies)
    assert copies.host(1000).is_pinned()
    assert memory.gather({"w": torch.ones(10, device=DEVICE)}).is_pinned()
    landing = memory.landing(1000, None)
    assert landing.is_pinned() and memory.landing(1000, landing).data_ptr() == landing.data_ptr()
    tensors = {"w": torch.ones(10, device=DEVICE)}
    assert pack(tensors, layout(tensors)).is_pinned()


@pytest.mark.parametrize("pinned", [True, False])
def test_a_version_arrives_whole_while_the_device_is_busy(pinned: bool) -> None:
    """Longer than all pieces together, so that each is used several times."""
    nbytes = STAGE_NBYTES * (2 * STAGES + 1) + 123
    memory = DeviceMemory(CudaCopies(torch.device(DEVICE)))
    for seed in range(3):
        source = torch.randint(
            0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
        given = source.pin_memory() if pinned else source.clone()
        _keep_busy()
        found = memory.upload(given)
        if not pinned:
            given.zero_()
        assert torch.equal(found.cpu(), source)


def test_tensors_leave_as_the_computation_before_leaves_them() -> None:
    memory = DeviceMemory(CudaCopies(torch.device(DEVICE)))
    for value in range(1, 6):
        _keep_busy()
        tensors = {
            "w": torch.full((1 << 20,), float(value), device=DEVICE),
            "b": torch.ones(3, device=DEVICE),
        }
        flat = memory.gather(tensors)
        here = {name: tensor.cpu() for name, tensor in tensors.items()}
        assert torch.equal(flat, pack(here, layout(here)))
        back = memory.scatter(here)
        assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def _keep_busy() -> torch.Tensor:
    large = torch.rand(2048, 2048, device=DEVICE)
    for _ in range(20):
        large = torch.tanh(large @ large)
    return large


# --- the model's half -------------------------------------------------------------------


@contextmanager
def _no_hidden_wait() -> Iterator[None]:
    """torch raises where an operator would wait for the device; a wait for an event is not one."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:.*prototype:UserWarning")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("make", [models.mlp, models.gpt], ids=["mlp", "gpt"])
def test_a_shard_has_the_same_bits_again_and_hides_no_wait(
    make: Callable[[], Recipe], precision: str
) -> None:
    config = _config(precision=precision)
    recipe = resolved(make())
    data, replica = open_dataset(recipe, config), Replica.build(recipe, config, DEVICE)
    replica.attach(replica.pack())
    indices = Plan(len(data), config).indices(0, 1)
    compute = partial(gradient.compute, replica, recipe, config, data, indices)
    first = compute(0, 1)
    compute(1, 0)
    with _no_hidden_wait() if make is models.mlp else nullcontext():  # torch's embeddings may wait
        again = compute(0, 1)
    assert all(torch.equal(first.gradients[name], tensor) for name, tensor in again.gradients.items())
    assert (first.loss, first.grad_norm) == (again.loss, again.grad_norm)
    assert all(tensor.is_cpu and tensor.is_pinned() for tensor in again.gradients.values())


@pytest.mark.filterwarnings("ignore:.*prototype:UserWarning")
def test_local_steps_have_the_same_bits_in_another_process_copy() -> None:
    config = _config(shards=2, local_steps=4, clip_norm=0.5)
    recipe = resolved(models.mlp())
    data = open_dataset(recipe, config)
    parts = Plan(len(data), config).parts(0, 1)
    found = []
    for _ in range(2):
        replica = Replica.build(recipe, config, DEVICE)
        replica.attach(replica.pack())
        taken = local_steps.compute(replica, recipe, config, data, parts, 0, 1)
        found.append(local_steps.compute(replica, recipe, config, data, parts, 1, 1, taken.state))
    one, other = (each.gradient for each in found)
    assert all(torch.equal(one.gradients[name], tensor) for name, tensor in other.gradients.items())
    assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)


def test_an_update_gives_the_same_version_again() -> None:
    flats = []
    for _ in range(2):
        trainer = Trainer.build(resolved(models.mlp()), _config(clip_norm=0.1), DEVICE)
        gradients = {name: torch.full(p.shape, 0.5) for name, p in trainer.replica.parameters.items()}
        for step in range(3):
            trainer.apply(dict(gradients), {}, step=step, loss=1.0)
        flats.append(trainer.replica.pack(torch.empty(trainer.replica.nbytes(), dtype=torch.uint8)))
    assert torch.equal(*flats)


# --- processes --------------------------------------------------------------------------


def devices_open(pid: int) -> bool:
    """Whether a process has a GPU's device file open."""
    links = Path(f"/proc/{pid}/fd")
    names = []
    for link in links.iterdir():
        try:
            names.append(os.readlink(link))
        except OSError:
            continue
    return any(
        name.startswith("/dev/nvidia") and name.removeprefix("/dev/nvidia").isdigit() for name in names
    )


def test_prefork_children_take_the_devices_and_the_parent_none(tmp_path: Path) -> None:
    """A child that inherited an initialised CUDA could not train at all."""
    recipe, config = models.mlp(evaluation=None, metrics=None), _config(shards=8)
    with fleet(tmp_path, workers=1, pool="prefork", concurrency=2, env={"TORCHORD_DEVICE": "cuda"}) as one:
        run, _ = one.train(recipe, config, "forked")
        parents = [worker.pid for worker in one.cluster.processes.values()]
        computed = {int(worker.rpartition("/")[2].partition("-")[0]) for worker in run.verify().workers}
        assert computed and not computed & set(parents)
        assert all(devices_open(pid) for pid in computed)
        assert not any(devices_open(pid) for pid in parents)


def test_cuda_in_use_before_the_import_is_refused_with_a_remedy() -> None:
    program = (
        "import torch; torch.ones(2, 2, device='cuda') @ torch.ones(2, 2, device='cuda')\n"
        "from torchord.coordinator.compute.determinism import pinned\n"
        "with pinned(1, True, 'cuda'): pass"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1 and "CUBLAS_WORKSPACE_CONFIG=:4096:8" in ended.stderr
