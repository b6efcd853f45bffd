"""The messages that a commit publishes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchord.cache import keys


@dataclass(frozen=True, slots=True)
class Launch:
    """The messages of one step's chord, to be published in the transaction that makes it possible.

    Attributes:
        step: the step.
        incarnation: what they were made for; under another one nothing is published.
        size_key: where Celery keeps the chord's size.
        size: how many tasks the chord has: these, and those that are published later.
        size_ttl_seconds: lifetime of that.
        queue: the list that is the broker's queue.
        seconds: what a shard takes, by which the run's turn is reckoned (scripts/ranked.lua).
        messages: one a shard.
    """

    step: int
    incarnation: str
    size_key: str
    size: int
    size_ttl_seconds: int
    queue: str
    seconds: float
    messages: tuple[bytes, ...]

    def arguments(self, run: str) -> list[Any]:
        """What scripts/commit.lua is told of it."""
        chord = [self.size, self.size_ttl_seconds]
        turn = [run, self.seconds, keys.WORK_TTL_SECONDS]
        return [self.step, self.incarnation, *chord, *turn, *self.messages]
