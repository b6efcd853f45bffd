"""Whoever is on call sees a worker die and come back, and what that cost the run."""

from __future__ import annotations

import threading
from urllib.request import urlopen

from tests.faults.laboratory import HOURS, Laboratory
from tests.support.waiting import wait_until
from tests.unit.coordinator.metrics.test_metrics import scraped, value
from torchord.cache.settings import Settings
from torchord.coordinator.metrics import families
from torchord.coordinator.metrics.collector import Collector
from torchord.coordinator.metrics.serving import server
from torchord.coordinator.runtime.control_plane import ControlPlane


def test_a_kill_is_seen_in_the_metrics_and_so_is_the_recovery(lab: Laboratory) -> None:
    reference = lab.reference
    with server(Collector(ControlPlane(Settings(url=lab.cluster.url))).text, "127.0.0.1", 0) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()

        def told(family: families.Family, *labels: str) -> float | None:
            with urlopen(f"http://127.0.0.1:{serving.server_port}/metrics", timeout=30) as reply:
                return value(scraped(reply.read().decode()), family, *labels)

        def workers(count: int, of: families.Family = families.WORKERS) -> None:
            wait_until(lambda: told(of, "client") == count, message=f"{count} Clients in {of.name}")

        workers(2)
        lab.slow(HOURS)
        run = lab.submit()
        workers(2, families.BUSY)
        assert told(families.STATE, run.name, "running") == 1
        lab.clients()[0].kill()
        workers(1)
        lab.revive()
        workers(2)
        lab.check(run, reference=reference)
        wait_until(lambda: told(families.STATE, run.name, "done") == 1, message="the run's end")
        assert told(families.STEPS, run.name) == told(families.PLANNED, run.name) == 15
        assert told(families.LOSS, run.name) == run.history()[-1].loss
        assert (told(families.RETRIES, run.name) or 0) >= 1
        assert (told(families.RECOVERIES, run.name) or 0) >= 1
        assert (told(families.RECOVERY, run.name) or 0) > 0
        wait_until(lambda: told(families.LOOKUPS, "process", "yes"), message="the Clients' counters")
        serving.shutdown()
        thread.join()
