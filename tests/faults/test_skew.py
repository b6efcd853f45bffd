"""Workers that would compute other bits (another CPU capability, other code): refused, or admitted on request."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.errors import NoWorker
from coordinator import Run
from tests.faults.laboratory import CONFIG, Laboratory, Outcome
from tests.faults.recipes import Slow
from tests.support.waiting import wait_until

ODD = {"ATEN_CPU_CAPABILITY": "default"}
"""Makes torch leave the vector units of the CPU alone, as on an older machine."""

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this CPU has no capability to leave alone"
)

LOSS = """
import torch.nn.functional as F

def loss(outputs, targets):
    if {broken}:
        raise ValueError("a mistake in the recipe")
    return F.cross_entropy(outputs, targets)
"""


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    """A cluster with an ordinary Client and one on an unlike machine, which import recipes from `code`."""
    folder = tmp_path_factory.mktemp("skewed")
    (folder / "code").mkdir()
    sys.path.insert(0, str(folder / "code"))
    allowed = {"TORCHORD_ALLOWED_MODULES": "tests,torch,my_loss"}
    lab = Laboratory(folder, standby=0, workers=1, env=allowed)
    lab.cluster.add_worker("odd", env=ODD)
    lab.cluster.wait_ready()
    yield lab
    sys.path.remove(str(folder / "code"))
    lab.close()


@pytest.fixture
def odd_paused(skewed: Laboratory) -> Iterator[Laboratory]:
    """The cluster with its unlike Client stopped, so that the ordinary one is the first to compute."""
    skewed.cluster.processes["odd"].pause()
    yield skewed
    skewed.cluster.processes["odd"].cont()
    skewed.cluster.processes["client1"].cont()


@pytest.fixture
def reference(odd_paused: Laboratory) -> Outcome:
    """What the ordinary Client computes alone."""
    return odd_paused.reference


def pid_of(lab: Laboratory, name: str) -> str:
    return f"/{lab.cluster.processes[name].pid}-"


def workers_of(run: Run) -> str:
    """Ids of all workers whose gradients were applied."""
    return " ".join(worker for report in run.history() for worker in report.workers)


def refusals(run: Run) -> list[dict[str, Any]]:
    return [event.data for event in run.events() if event.type == "refused"]


def first_begun(run: Run) -> None:
    """Wait until the first shard has fixed the run's environment."""
    wait_until(lambda: run._ledger.head().environment, message="the first shard")


def test_an_unlike_machine_is_refused(odd_paused: Laboratory, reference: Outcome) -> None:
    """The run's environment is that of the first worker to compute; the other hands its shards on."""
    run = odd_paused.submit()
    first_begun(run)
    odd_paused.cluster.processes["odd"].cont()
    odd_paused.check(run, reference=reference)
    assert pid_of(odd_paused, "odd") not in workers_of(run)


def test_it_is_said_who_is_refused_and_why(
    odd_paused: Laboratory, reference: Outcome, tmp_path: Path
) -> None:
    lab, speeds = odd_paused, tmp_path / "speeds"
    speeds.write_text(f"{lab.cluster.processes['client1'].pid} 3600")
    run = lab.submit(dataset=partial(Slow, speeds=str(speeds)))
    first_begun(run)
    lab.cluster.processes["client1"].pause()
    lab.cluster.processes["odd"].cont()
    refused = wait_until(lambda: run.status().refused, message="the refusal")
    assert pid_of(lab, "odd") in refused[0]
    assert "is computed on torch" in refused[0] and "this worker has torch" in refused[0]
    with pytest.raises(NoWorker, match="admit_skew"):
        run.wait(worker_timeout=0.5, timeout=60)
    speeds.unlink()
    lab.cluster.processes["client1"].cont()
    lab.check(run, reference=reference)
    assert len(refusals(run)) == 1


def test_admitted_on_request(odd_paused: Laboratory, reference: Outcome, tmp_path: Path) -> None:
    """A person decides that any bits will do."""
    lab, speeds = odd_paused, tmp_path / "speeds"
    speeds.write_text(f"{lab.cluster.processes['client1'].pid} 3600")
    run = lab.submit(dataset=partial(Slow, speeds=str(speeds)))
    first_begun(run)
    lab.cluster.processes["client1"].pause()
    lab.cluster.processes["odd"].cont()
    wait_until(lambda: run.status().refused, message="the refusal")
    run.resume(admit_skew=True)
    lab.check(run, reference=None)
    assert pid_of(lab, "odd") in workers_of(run)
    speeds.unlink()


def test_admitted_by_the_config(odd_paused: Laboratory, reference: Outcome) -> None:
    lab = odd_paused
    run = lab.submit(dataclasses.replace(CONFIG, skew="admit"))
    first_begun(run)
    lab.cluster.processes["client1"].pause()
    lab.cluster.processes["odd"].cont()
    lab.check(run, reference=None)
    assert pid_of(lab, "odd") in workers_of(run) and not refusals(run)


def test_other_code_is_refused_until_it_is_corrected(odd_paused: Laboratory, reference: Outcome) -> None:
    """A worker that was started before an edit still has the old code, whatever the file says now."""
    lab, file = odd_paused, Path(sys.path[0]) / "my_loss.py"
    file.write_text(LOSS.format(broken=True))
    run = lab.submit(loss="my_loss:loss")
    wait_until(lambda: run.status().state == "failed", 60, "the failure")
    assert "a mistake in the recipe" in (run.status().error or "")
    file.write_text(LOSS.format(broken=False))
    run.resume()
    refused = wait_until(lambda: run.status().refused, message="the refusal")
    assert "another version of my_loss" in refused[0]
    lab.cluster.restart("client1")
    lab.cluster.restart("server")
    lab.check(run, reference=reference)
