"""A path between a Client and its server forgets all connections, as a NAT does when it restarts."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from tests.support import models, reference
from tests.support.relay import Relay
from tests.support.waiting import wait_until
from torchord import LocalCluster, Master, TrainingConfig

CONFIG = TrainingConfig(epochs=40, batch_size=8, shards=2, seed=3)
WAIT_SECONDS = 60.0  # kombu alone takes minutes: its connections have no timeout, keepalive two hours

pytestmark = pytest.mark.slow


def test_a_client_comes_back_by_itself(cluster: Callable[..., LocalCluster]) -> None:
    """The only Client hears nothing more; it finds out, connects anew, and the run keeps its bits."""
    here = cluster(0)
    place = urlsplit(here.url)
    assert place.port is not None
    with Relay(place.port) as relay:
        here.add_worker(role="server")
        here.add_worker(env={"TORCHORD_URL": place._replace(netloc=f"127.0.0.1:{relay.port}").geturl()})
        here.wait_ready()
        recipe = models.mlp()
        run = Master(here.url, checkpoint_dir=here.checkpoint_dir).submit(recipe, CONFIG, name="forgotten")
        wait_until(lambda: run.status().version >= 5, message="the first steps")
        assert relay.forget() >= 2
        trained = run.wait(timeout=WAIT_SECONDS)
        assert relay.swallowed > 0, "nobody used a connection that was forgotten"
        assert run.verify().ok
        assert reference.bits(trained.module) == reference.accumulate(recipe, CONFIG).bits
        here.processes["client1"].kill()  # before its path goes
