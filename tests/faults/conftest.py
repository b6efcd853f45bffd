"""The laboratory that most experiments share: a training server, a standby and two Clients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.laboratory import Laboratory
from tests.support.keys import keys_without_ttl


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    """One cluster for most of the experiments; no torchord key may stay without a TTL."""
    laboratory = Laboratory(tmp_path_factory.mktemp("laboratory"))
    try:
        yield laboratory
        forever = keys_without_ttl(laboratory.cluster.url)
        assert not forever, f"keys without a TTL: {forever[:20]}"
    finally:
        laboratory.close()
