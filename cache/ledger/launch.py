"""The messages that a commit publishes."""

from __future__ import annotations

from dataclasses import dataclass


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
        messages: one a shard.
    """

    step: int
    incarnation: str
    size_key: str
    size: int
    size_ttl_seconds: int
    queue: str
    messages: tuple[bytes, ...]
