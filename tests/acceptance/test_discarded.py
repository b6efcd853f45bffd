"""A Celery worker of somebody else's app serves our queue by mistake, and throws our messages away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support import models, reference
from tests.support.fleet import fleet
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from torchord import TrainingConfig
from torchord.coordinator.messages.task_names import GRADIENTS

STRANGER = """
import os
from celery import Celery

app = Celery("stranger", broker=os.environ["STRANGERS_URL"])
app.conf.task_default_queue = "torchord.gradients"
"""
CONFIG = TrainingConfig(epochs=4, batch_size=4, shards=2)


def test_a_run_whose_messages_are_thrown_away_says_so_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "stranger.py").write_text(STRANGER)
    recipe = models.mlp(16, evaluation=None, metrics=None)
    with fleet(tmp_path, workers=1) as one:
        log = tmp_path / "stranger.log"
        command = [sys.executable, "-m", "celery", "-A", "stranger", "worker", "-n", "stranger@%h"]
        environment = {**os.environ, "STRANGERS_URL": one.cluster.url}
        with log.open("wb") as output:
            stranger = subprocess.Popen(
                [*command, "--pool", "solo", "-l", "INFO"],
                cwd=tmp_path, env=environment, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        try:
            wait_until(lambda: b" ready." in log.read_bytes(), message=lambda: log.read_text()[-2000:])
            run = one.master.submit(recipe, CONFIG, name="robbed")
            (said,) = wait_until(lambda: run.status().discarded, message="the supervisor to find out")
            assert "unregistered" in log.read_text()
        finally:
            os.killpg(stranger.pid, signal.SIGKILL)
            stranger.wait()
        trained = run.wait(timeout=PATIENCE_SECONDS)
        assert GRADIENTS in said and "thrown away by somebody who is no torchord worker" in said
        assert [event.data["queue"] for event in run.events() if event.type == "discarded"] == [GRADIENTS]
        assert run.status().discarded == () and run.verify().ok
    assert reference.bits(trained.module) == reference.accumulate(recipe, CONFIG).bits
