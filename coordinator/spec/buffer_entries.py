"""A recipe's rules for buffers, as they are given: words, and functions by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchord.cache.errors import RecipeError
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.targets import Entry, decode

WORDS = ("shard0", "mean", "sum")
"""Rules that are no function, see `torchord.coordinator.compute.buffer_rules`."""

_ACCEPTED = (
    "'shard0', 'mean', 'sum', a function (old, values, examples) -> new, or the string "
    "'package.module:attribute' of one"
)


def check_buffers(buffers: Any) -> None:
    """Refuse what is no dict of rules.

    Raises:
        RecipeError: says what is accepted.
    """
    if buffers is not None and not isinstance(buffers, Mapping):
        raise RecipeError(f"buffers must be a dict of a buffer's name or pattern -> {_ACCEPTED}")
    for name, rule in (buffers or {}).items():
        if isinstance(rule, str) and ":" not in rule and rule not in WORDS:
            raise RecipeError(f"buffers: the rule of {name!r} is {rule!r}, but must be {_ACCEPTED}")


def words_of(buffers: Mapping[str, Entry] | None) -> dict[str, str]:
    """Those rules that are words."""
    return {
        name: WORDS[WORDS.index(rule)]  # a str enumeration's value
        for name, rule in (buffers or {}).items()
        if isinstance(rule, str) and rule in WORDS
    }


def functions_of(buffers: Mapping[str, Entry] | None) -> dict[str, Entry]:
    """Those rules that are functions, as entries of the recipe."""
    words = words_of(buffers)
    return {name: rule for name, rule in (buffers or {}).items() if name not in words}


def decoded(value: Mapping[str, Any]) -> dict[str, Entry]:
    """The rules of a spec; arguments and errors as for `targets.decode`."""
    return {name: rule if rule in WORDS else decode(f"buffers.{name}", rule) for name, rule in value.items()}


def require_apart(buffers: Mapping[str, Entry] | None, config: TrainingConfig) -> None:
    """Refuse a function of all shards' values where partial sums would not keep them apart.

    Raises:
        RecipeError: names the buffer and the field of the config.
    """
    added = [name for name, rule in words_of(buffers).items() if rule == "sum"]
    if config.micro_batch_size is not None and (whole := [*functions_of(buffers), *added]):
        raise RecipeError(
            f"buffers: the rule of {whole[0]!r} is one of whole shards, and with micro_batch_size they are "
            "computed in parts; leave that out and set more shards, or use 'shard0', 'mean' or 'agree'"
        )
    if config.shard_count > config.fan_in and (names := functions_of(buffers)):
        raise RecipeError(
            f"buffers: the rule of {next(iter(names))!r} is a function of all shards' values, which partial "
            f"sums do not keep (shards={config.shards}, fan_in={config.fan_in}); set fan_in={config.shards}, "
            "or use 'shard0', 'mean' or 'sum'"
        )
