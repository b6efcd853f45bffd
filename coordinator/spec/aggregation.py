"""What a robust average of shards cannot go with, refused before a run begins."""

from __future__ import annotations

from torchord.cache.errors import ConfigError, RecipeError

AGGREGATIONS = ("mean", "median", "trimmed_mean", "krum")


def require_robust(kind: str, faults: int, *, shards: int, fan_in: int, compression: str) -> None:
    """Refuse a config whose shards cannot be averaged as it asks.

    Args:
        kind, faults: `TrainingConfig.aggregation` and `aggregation_faults`; the others are fields of it, too.

    Raises:
        ConfigError: there are too few or too many of them, or they are compressed.
    """
    if kind == "mean":
        return
    least = {"median": 3, "trimmed_mean": 2 * faults + 1, "krum": 2 * faults + 3}[kind]
    if shards < least:
        told = "" if kind == "median" else f" with aggregation_faults={faults}"
        raise ConfigError(f"aggregation={kind!r}{told} takes at least {least} shards, not {shards}")
    if shards > fan_in:
        raise ConfigError(
            f"aggregation={kind!r} needs each shard's gradient in one place, and shards={shards} above "
            f"fan_in={fan_in} are added up on the way: set fan_in to {shards}, or use the mean"
        )
    if compression != "none":
        raise ConfigError(
            f"aggregation={kind!r} leaves shards out, whose codec would go on as if they had counted: use "
            f"compression='none' in place of {compression!r}, or the mean"
        )


def require_equal_shards(weight: object, loss_over: str, aggregation: str) -> None:
    """Refuse a recipe whose shards weigh what their losses say, where they are to count alike.

    Args:
        weight, loss_over: the recipe's.
        aggregation: the config's.

    Raises:
        RecipeError: it has one of them; names it.
    """
    if aggregation == "mean" or (weight is None and loss_over == "batch"):
        return
    entry = "weight" if weight is not None else f"loss_over={loss_over!r}"
    raise RecipeError(
        f"{entry}: a shard would weigh what its loss says of itself, and with "
        f"aggregation={aggregation!r} all shards count alike: leave it out, or use the mean"
    )
