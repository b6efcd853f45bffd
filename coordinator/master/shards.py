"""How many shards a run has whose config leaves that to its fleet, fixed when it is submitted.

Two for each Client that would compute it: whoever is faster takes more of them, and one that joins finds
something to do. The number is part of the run from then on, since its bits depend on it; the fleet is not.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torchord.cache.ledger.hardware import is_portable
from torchord.cache.ledger.workers import WorkerInfo
from torchord.coordinator.local_cluster.starting import StartedWorker
from torchord.coordinator.messages.task_names import GRADIENTS
from torchord.coordinator.spec.config import AUTO, TrainingConfig

log = logging.getLogger(__name__)

PER_CLIENT = 2


def fixed(
    config: TrainingConfig, alive: Mapping[str, WorkerInfo], started: Iterable[StartedWorker] = ()
) -> TrainingConfig:
    """The config with a number of shards; the same where it has one.

    Two for each Client, at most `fan_in` while that leaves each one, at least two examples in each; where
    there is no Client yet, the default.

    Args:
        alive: the living workers, by id.
        started: workers of this program that are starting.

    Raises:
        ConfigError: something in the config does not go with so many.
    """
    if config.shards != AUTO:
        return config
    clients = _clients(config, alive, started)
    wanted = PER_CLIENT * clients
    if not clients:
        wanted = TrainingConfig().shard_count
    elif clients <= config.fan_in:
        wanted = min(wanted, config.fan_in)
    shards = max(1, min(wanted, config.batch_size // 2))
    log.info("shards='auto': %d, with %d Client(s) in the fleet", shards, clients)
    return replace(config, shards=shards)


def _clients(
    config: TrainingConfig, alive: Mapping[str, WorkerInfo], started: Iterable[StartedWorker]
) -> int:
    """How many processes would compute the run: the most that are alike, and those that are starting."""
    here = [info for info in alive.values() if GRADIENTS in info.queues and info.environment]
    if config.hardware == "portable":
        here = [info for info in here if is_portable(info.environment)]
    kinds = Counter(info.environment for info in here)
    alike = kinds.most_common(1)[0][1] if kinds and config.skew == "refuse" else len(here)
    names = {info.node.partition("@")[0] for info in alive.values()}
    return alike + sum(worker.serves(GRADIENTS) and worker.name not in names for worker in started)
