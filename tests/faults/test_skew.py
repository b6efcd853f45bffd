"""Workers that would compute other bits, for their CPU or their code: refused, or admitted on request."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.faults.laboratory import CONFIG, HOURS, WAIT_SECONDS, Laboratory, Outcome, wait_version
from tests.support.waiting import wait_until
from torchord import Run
from torchord.cache.errors import NoWorker
from torchord.coordinator.runtime.environment import environment, processor_vendor

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
def skewed(lab: Laboratory) -> Iterator[Laboratory]:
    """The laboratory with one more Client, on an unlike machine."""
    lab.cluster.add_worker("odd", env=ODD)
    lab.revive()
    lab.cluster.wait_ready()
    yield lab
    lab.dismiss("odd")


@pytest.fixture
def odd_paused(skewed: Laboratory) -> Iterator[Laboratory]:
    """The same with the unlike Client stopped, so that an ordinary one is the first to compute."""
    skewed.cluster.processes["odd"].pause()
    yield skewed
    for client in skewed.clients():
        client.cont()


@pytest.fixture
def reference(odd_paused: Laboratory) -> Outcome:
    """What the ordinary Clients compute."""
    return odd_paused.reference


def swap(lab: Laboratory) -> None:
    """Stop the ordinary Clients and let the unlike one go on."""
    for client in lab.clients():
        client.cont() if client.name == "odd" else client.pause()


def hold(lab: Laboratory) -> None:
    """Keep the ordinary Clients at their first shard until `lab.fast()`."""
    lab.slow(HOURS, *(client.name for client in lab.clients() if client.name != "odd"))


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


def test_the_vendor_of_the_processor_is_part_of_the_environment() -> None:
    vendor = processor_vendor()
    assert environment().endswith(vendor)
    assert vendor or not sys.platform.startswith("linux")


def test_it_is_said_who_is_refused_and_why(odd_paused: Laboratory, reference: Outcome) -> None:
    lab = odd_paused
    hold(lab)
    run = lab.submit()
    first_begun(run)
    swap(lab)
    refused = wait_until(lambda: run.status().refused, message="the refusal")
    assert pid_of(lab, "odd") in refused[0]
    assert "is computed on torch" in refused[0] and "this worker has torch" in refused[0]
    with pytest.raises(NoWorker, match="admit_skew"):
        run.wait(worker_timeout=0.5, timeout=WAIT_SECONDS)
    lab.fast()
    for client in lab.clients():
        client.cont()
    lab.check(run, reference=reference)
    assert len(refusals(run)) == 1


def test_admitted_on_request(odd_paused: Laboratory, reference: Outcome) -> None:
    """A person decides that any bits will do."""
    lab = odd_paused
    hold(lab)
    run = lab.submit()
    first_begun(run)
    swap(lab)
    wait_until(lambda: run.status().refused, message="the refusal")
    run.resume(admit_skew=True)
    wait_version(run, run.status().total_steps)
    lab.check(run, reference=None)
    assert pid_of(lab, "odd") in workers_of(run)


def test_admitted_by_the_config(odd_paused: Laboratory, reference: Outcome) -> None:
    lab = odd_paused
    run = lab.submit(dataclasses.replace(CONFIG, skew="admit"))
    first_begun(run)
    swap(lab)
    lab.check(run, reference=None)
    assert pid_of(lab, "odd") in workers_of(run) and not refusals(run)


def test_other_code_is_refused_until_it_is_corrected(odd_paused: Laboratory, reference: Outcome) -> None:
    """A worker that was started before an edit still has the old code, whatever the file says now."""
    lab = odd_paused
    file = lab.code / "my_loss.py"
    file.write_text(LOSS.format(broken=True))
    run = lab.submit(loss="my_loss:loss")
    wait_until(lambda: run.status().state == "failed", message="the failure")
    assert "a mistake in the recipe" in (run.status().error or "")
    file.write_text(LOSS.format(broken=False))
    run.resume()
    refused = wait_until(lambda: run.status().refused, message="the refusal")
    assert "another version of my_loss" in refused[0]
    for name in ("server", "standby1", "client1"):
        lab.cluster.processes[name].kill()
    lab.check(run, reference=reference)
