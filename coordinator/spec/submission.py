"""A run as a TOML file has it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torchord.cache.errors import InvalidInput
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.recipe import Recipe
from torchord.coordinator.spec.targets import Target

_TABLES = ("metrics", "buffers")
_WORDS = ("loss_over",)
_KNOWN = {"name", "recipe", "config", "start_from", "on", "callbacks", "adjustable"}
_HAS = "name, [recipe], [config], start_from, [on], callbacks and adjustable"


@dataclass(frozen=True)
class Submission:
    """What a file says.

    Attributes:
        name: of the run; None: one made from the time.
        recipe: what to train.
        config: how.
        start_from, on, callbacks: see `Master.submit`.
        adjustable: fields of the config that whoever submits it by its name may choose.
    """

    name: str | None
    recipe: Recipe
    config: TrainingConfig
    start_from: str | None
    on: dict[str, Any] | None
    adjustable: tuple[str, ...] = ()
    callbacks: list[Any] | None = None

    def options(self) -> dict[str, Any]:
        """What `submit` is given beside recipe, config and name."""
        return {"start_from": self.start_from, "on": self.on, "callbacks": self.callbacks}

    def adjusted(self, config: Mapping[str, Any]) -> Submission:
        """The same with other values of some fields of the config.

        Raises:
            InvalidInput: a field is not among the adjustable ones.
            ConfigError: a value is out of range.
        """
        if locked := sorted(set(config) - set(self.adjustable)):
            choice = ", ".join(self.adjustable) or "nothing"
            raise InvalidInput(f"{locked[0]!r} of this recipe's config is fixed; it lets {choice} be chosen")
        return replace(self, config=replace(self.config, **config))


def read(text: str) -> Submission:
    """What a TOML file says.

    An entry of the recipe is a name, `model = "shop.models:Net"`, or a table whose `target` is the name and
    whose other keys are keyword arguments, `optimizer = {target = "torch.optim:AdamW", lr = 0.01}`; `args`
    has positional ones.

    Raises:
        InvalidInput: it is no TOML, or has what no run has.
        RecipeError, ConfigError: recipe or config are none.
    """
    try:
        said = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"it is no TOML: {error}") from error
    if unknown := sorted(said.keys() - _KNOWN):
        raise InvalidInput(f"it has {unknown[0]!r}; a run has {_HAS}")
    recipe, config = said.get("recipe"), said.get("config", {})
    if not isinstance(recipe, dict) or not isinstance(config, dict):
        raise InvalidInput("a run needs a table [recipe]: model, dataset, optimizer, and a loss or a step")
    known = {field.name for field in fields(Recipe)}
    if unknown := sorted(recipe.keys() - known):
        raise InvalidInput(f"[recipe] has {unknown[0]!r}; known are {', '.join(sorted(known))}")
    if lacking := [name for name in ("model", "dataset", "optimizer") if name not in recipe]:
        raise InvalidInput(f"[recipe] lacks {lacking[0]!r}")
    if unknown := sorted(config.keys() - {field.name for field in fields(TrainingConfig)}):
        raise InvalidInput(f"[config] has {unknown[0]!r}, which is no field of TrainingConfig")
    adjustable = said.get("adjustable", [])
    if not isinstance(adjustable, list) or not {*map(str, adjustable)} <= {
        f.name for f in fields(TrainingConfig)
    }:
        raise InvalidInput("adjustable is a list of fields of TrainingConfig")
    entries = {name: _entries(name, value) for name, value in recipe.items()}
    made = Recipe(**entries), TrainingConfig(**config)
    return Submission(
        said.get("name"),
        *made,
        said.get("start_from"),
        said.get("on"),
        tuple(map(str, adjustable)),
        None if "callbacks" not in said else _callbacks(said["callbacks"]),
    )


def _callbacks(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidInput('it has callbacks, which is a list of "module:Class" or of tables with a target')
    return [_entry(f"callbacks.{number}", each) for number, each in enumerate(value)]


def _entries(name: str, value: Any) -> Any:
    if name in _WORDS:
        return value
    if name in _TABLES:
        if not isinstance(value, dict):
            raise InvalidInput(f"[recipe] has {name!r}, which is a table of names")
        return {key: _entry(f"{name}.{key}", each) for key, each in value.items()}
    return _entry(name, value)


def _entry(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and name.startswith("metrics."):
        return tuple(_entry(name, each) for each in value)
    if not isinstance(value, Mapping) or not isinstance(value.get("target"), str):
        raise InvalidInput(
            f'[recipe] has {name!r}, which is "module:name", or a table of target = "module:name" and '
            "arguments"
        )
    given = {key: each for key, each in value.items() if key not in ("target", "args")}
    return Target(value["target"], tuple(value.get("args", ())), given)
