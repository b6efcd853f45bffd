"""`torchord submit FILE`: a run as a TOML file has it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from torchord.cache.errors import CacheUnreachable, InvalidInput, TorchordError
from torchord.coordinator.commands.common import BAD, OK, UNREACHABLE, USAGE, find_modules_here
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.recipe import Recipe
from torchord.coordinator.spec.targets import Target

_TABLES = ("metrics", "buffers")
_WORDS = ("loss_over",)


@dataclass(frozen=True)
class Submission:
    """What a file says.

    Attributes:
        name: of the run; None: one made from the time.
        recipe: what to train.
        config: how.
        start_from, on: see `Master.submit`.
    """

    name: str | None
    recipe: Recipe
    config: TrainingConfig
    start_from: str | None
    on: dict[str, Any] | None


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
    if unknown := sorted(said.keys() - {"name", "recipe", "config", "start_from", "on"}):
        raise InvalidInput(f"it has {unknown[0]!r}; a run has name, [recipe], [config], start_from and [on]")
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
    entries = {name: _entries(name, value) for name, value in recipe.items()}
    return Submission(
        said.get("name"),
        Recipe(**entries),
        TrainingConfig(**config),
        said.get("start_from"),
        said.get("on"),
    )


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


@click.command(
    "submit",
    help="Submit a run as a TOML file has it: name, [recipe], [config]; modules are found from the "
    "directory that this is started in, as workers find them in theirs.",
)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--name", help="Name of the run, in place of the file's.")
@click.option("--url", metavar="URL", help="Redis URL of broker and control plane (else TORCHORD_URL).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def submit(file: Path, name: str | None, url: str | None, as_json: bool) -> int:
    """See the help."""
    from torchord.cache.ledger.figures import for_others
    from torchord.coordinator.master.master import Master

    find_modules_here()
    try:
        said = read(file.read_text(encoding="utf-8"))
        run = Master(url).submit(
            said.recipe, said.config, name=name or said.name, start_from=said.start_from, on=said.on
        )
        state = run.status().state
    except InvalidInput as error:
        click.echo(f"error: {file}: {error}", err=True)
        return USAGE
    except (TorchordError, UnicodeDecodeError) as error:
        click.echo(f"error: {file}: {error}", err=True)
        return UNREACHABLE if isinstance(error, CacheUnreachable) else BAD
    if as_json:
        click.echo(for_others({"name": run.name, "state": state}))
    else:
        click.echo(f"{run.name}: {state}; `torchord watch {run.name}` follows it")
    return OK
