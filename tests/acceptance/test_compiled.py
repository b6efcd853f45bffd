"""torch.compile and channels-last on real workers: the same bits on any fleet; who cannot compile waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import models, reference
from tests.support.waiting import wait_until
from torchord import LocalCluster, Master, TrainingConfig
from torchord.cache.errors import CompilerMissing
from torchord.coordinator.compute.compiling import toolchain

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")]
CONFIG = TrainingConfig(
    epochs=1, batch_size=8, shards=2, seed=3, compile=True, memory_format="channels_last"
)  # 3 steps of equal shards: one size to compile for


@pytest.fixture(autouse=True)
def compiler() -> str:
    """This machine's; skips, in so many words, where there is none."""
    try:
        return toolchain("cpu")
    except CompilerMissing as error:
        pytest.skip(f"NOT TESTED, no C++ compiler here: {error}")


def test_compiled_runs_have_the_same_bits_on_any_fleet(
    cluster: Callable[..., LocalCluster], compiler: str, tmp_path: Path
) -> None:
    made = cluster(1, env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "one")})
    master = Master(made.url, checkpoint_dir=made.checkpoint_dir)
    run = master.submit(models.cnn(24), CONFIG, name="alone")
    alone = reference.bits(run.wait(timeout=240).module)
    made.add_worker("other", env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "other")})
    made.wait_ready()
    run = master.submit(models.cnn(24), CONFIG, name="together")
    assert reference.bits(run.wait(timeout=240).module) == alone
    audit = run.verify()
    assert audit.ok, audit.problems
    environments = {slot.environment for entry in run._ledger.entries() for slot in entry.slots}
    assert len(environments) == 1 and environments.pop().endswith(compiler)


def test_a_worker_without_a_compiler_leaves_the_run_to_others(cluster: Callable[..., LocalCluster]) -> None:
    made = cluster(1, env={"CXX": "no-such-compiler"})
    master = Master(made.url, checkpoint_dir=made.checkpoint_dir)
    run = master.submit(models.cnn(24), CONFIG, name="refused")
    [why] = wait_until(lambda: run.status().refused, 60, "the refusal")
    assert "no compiler that it can use for cpu" in why and "apt install g++" in why
    assert run.status().state == "running", "the run waits for a worker that can"
    made.add_worker("able", env={"CXX": None})
    run.wait(timeout=240)
    assert {worker.partition("@")[0] for worker in run.verify().workers} == {"able"}
