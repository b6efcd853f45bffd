"""How the cache's tiers served one task: shown in its result in Flower and in the event of a step."""

from __future__ import annotations

from typing import Any

from torchord.coordinator.runtime.services import Services

Tiers = dict[str, dict[str, float]]


def snapshot(services: Services) -> Tiers:
    """What each tier of this process has done since it began.

    Returns:
        "process": versions that were loaded already (hits), or not (misses). "host": blobs that this
        host had (hits), or not (misses), nbytes and seconds of the hits, local_nbytes that were shown to
        this host alone. "store": reads from the chunk store, their nbytes and seconds, ahead_nbytes of them
        that were read before they were asked for, and written_nbytes and written_seconds the other way.
    """
    fetches = services.parameters.counters
    tiers = services.chunks.counters
    return {
        "process": {"hits": fetches.process_hits, "misses": fetches.host_hits + fetches.misses},
        "host": {
            "hits": tiers.host_hits,
            "misses": tiers.store_reads if services.chunks.host is not None else 0,
            "nbytes": tiers.host_nbytes,
            "seconds": tiers.host_seconds,
            "local_nbytes": tiers.local_nbytes,
        },
        "store": {
            "reads": tiers.store_reads,
            "nbytes": tiers.store_nbytes,
            "seconds": tiers.store_seconds,
            "ahead_nbytes": tiers.ahead_nbytes,
            "written_nbytes": tiers.written_nbytes,
            "written_seconds": services.chunks.written_seconds,
        },
    }


def counted(services: Services) -> dict[str, float]:
    """What a heartbeat says of the tiers: TIER.COUNTER -> so far, what is zero left out."""
    return {
        f"{tier}.{name}": round(value, 3)
        for tier, found in snapshot(services).items()
        for name, value in found.items()
        if value
    }


def since(before: Tiers, services: Services) -> Tiers:
    """What the tiers have done since a snapshot; what is zero is left out.

    With several tasks at once in a process the difference is that of all of them.
    """
    found: dict[str, Any] = {}
    for tier, now in snapshot(services).items():
        grown = {name: round(value - before[tier][name], 6) for name, value in now.items()}
        if grown := {name: value for name, value in grown.items() if value}:
            found[tier] = grown
    return found
