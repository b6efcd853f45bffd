"""A run with hardware="portable": workers with kernels that machines share compute it, and nobody else."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.bench_portable import QEMU, differing, machines, matrix
from tests.support import falsified, models, reference
from tests.support.waiting import wait_until
from torchord import LocalCluster, Master, TrainingConfig
from torchord.cache.errors import NoWorker
from torchord.cache.settings import PORTABLE_KERNELS

COLD = True  # which kernels torch has is decided when it is imported
ROOT = Path(__file__).resolve().parents[2]
RECIPE = models.cnn(size=16, optimizer=partial(torch.optim.AdamW, lr=1e-2))
CONFIG = TrainingConfig(epochs=1, batch_size=8, shards=2, seed=3, clip_norm=1.0, hardware="portable")


def digest(state: torch.nn.Module | dict[str, torch.Tensor]) -> str:
    return hashlib.blake2b(repr(sorted(reference.bits(state).items())).encode()).hexdigest()


def portable_loop(**environment: str) -> str:
    """What the plain loop comes to in a process of its own that has portable kernels."""
    program = (
        "from tests.acceptance import test_portable as here\n"
        "from torchord.coordinator.compute.portable import install\ninstall()\n"
        "print(here.digest(here.reference.accumulate(here.RECIPE, here.CONFIG).module))"
    )
    env = {**os.environ, **environment, "TORCHORD_HARDWARE": "portable"}
    found = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=ROOT, check=True, capture_output=True, text=True
    )
    return found.stdout.strip()


def test_it_is_computed_by_portable_workers_alone(tmp_path: Path) -> None:
    """An ordinary worker leaves it to them and says so; the bits are the plain loop's with such kernels."""
    with LocalCluster(workers=1, hardware="portable", checkpoint_dir=tmp_path) as cluster:
        ordinary = {"TORCHORD_HARDWARE": "native", **dict.fromkeys(PORTABLE_KERNELS)}
        cluster.add_worker("native", env=ordinary)
        cluster.wait_ready()
        cluster.processes["client1"].pause()
        run = Master(cluster.url, checkpoint_dir=tmp_path).submit(RECIPE, CONFIG, name="portable")
        (said,) = wait_until(lambda: run.status().refused, message="the refusal")
        assert "has hardware='portable'" in said and "TORCHORD_HARDWARE=portable" in said
        cluster.processes["client1"].cont()
        trained = run.wait(progress=False, timeout=120)
        head = run._ledger.head()
        assert head.environment == head.server_environment == f"torch {torch.__version__}, portable x86-64"
        assert {slot.environment for entry in run._ledger.entries(0, 9) for slot in entry.slots} == {
            head.environment
        }
        assert run.verify().ok
        assert digest(trained.module) == portable_loop()


def test_a_machine_that_errs_does_not_start(tmp_path: Path) -> None:
    """One bit of one operator, in a worker that is otherwise as the others are."""
    with (
        LocalCluster(workers=0) as cluster,
        LocalCluster(
            url=cluster.url,
            layout="single",
            hardware="portable",
            app="tests.support.falsified",
            env={falsified.NAME: "layer norm"},
            checkpoint_dir=tmp_path,
        ) as erring,
    ):
        with pytest.raises(NoWorker) as told:
            erring.wait_ready()
        said = " ".join(str(told.value).split())
        assert "this worker cannot start: this machine computes 'layer norm' with other bits than" in said


@pytest.mark.slow
def test_other_processors_compute_the_same() -> None:
    """A dozen operators and a model, on emulated Intel and AMD processors where they can be had."""
    columns = machines(small=True)
    found = matrix(small=True)
    shared = [each.name for each in columns if each.portable]
    assert len(shared) == 3 and sum(bool(each.model) for each in columns) == (2 if shutil.which(QEMU) else 0)
    assert differing(found, shared) == {name: [] for name in shared}
    rows = [row for kind in found[shared[0]].values() for row in kind]
    assert len(rows) >= 11
    (native,) = (each.name for each in columns if not each.portable)
    assert "matmul" in differing(found, [native])[native], "what is pinned makes a difference"
