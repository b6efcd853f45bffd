"""`torchord data`: stored datasets."""

from __future__ import annotations

import importlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchord.cache.errors import DatasetMissing, InvalidInput
from torchord.coordinator.commands.common import (
    NOT_FOUND,
    OK,
    find_modules_here,
    guarded,
    told,
    with_json,
    with_url,
)

if TYPE_CHECKING:
    from torchord.cache.datasets.datasets import Datasets

_NAME = 24
_FOLDER = click.option(
    "--in", "folder", metavar="URL", help="A directory or fsspec URL in place of the cache."
)


def _datasets(url: str | None) -> Datasets:
    from torchord.coordinator.master.master import Master

    return Master(url).datasets


@click.group("data", help="Datasets that are stored for workers without a shared disk.")
def data() -> None:
    """See the help."""


@data.command("list")
@with_url
@with_json
@_FOLDER
def _list(url: str | None, as_json: bool, folder: str | None) -> int:
    """All of them, oldest first."""

    def perform() -> int:
        found = _datasets(url).list(url=folder)
        lines = [f"{'name':<{_NAME}}  {'samples':>12}  {'MB':>10}  stored on"]
        for each in found:
            name = each.name if len(each.name) <= _NAME else f"{each.name[: _NAME - 1]}…"
            at = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.created_at))
            lines.append(f"{name:<{_NAME}}  {each.samples:>12,}  {each.nbytes / 1e6:>10,.1f}  {at}")
        said = "\n".join(lines) if found else "No dataset is stored there."
        told(said, [asdict(each) for each in found], as_json=as_json)
        return OK

    return guarded(perform)


@data.command("put")
@click.argument("name")
@click.argument("source")
@with_url
@with_json
@_FOLDER
@click.option("--replace", is_flag=True, help="Let the name stand for other content from now on.")
@click.option("--verify", is_flag=True, help="Read what is stored already, and send again what is damaged.")
def _put(
    name: str, source: str, url: str | None, as_json: bool, folder: str | None, replace: bool, verify: bool
) -> int:
    """Store SOURCE as NAME.

    SOURCE is a file .npy, .npz or .safetensors, whose rows are the samples, or MODULE:FUNCTION, which is
    called and returns a dataset. A put that was interrupted goes on when it is called again.
    """

    def perform() -> int:
        report = _datasets(url).put(name, _read(source), url=folder, replace=replace, verify=verify)
        said = (
            f"{name}: {report.info.samples:,} samples, {report.info.nbytes / 1e6:,.1f} MB; {report.uploaded} "
            f"chunks sent, {report.reused} were there"
        )
        told(said, asdict(report), as_json=as_json)
        return OK

    return _found(perform)


@data.command("remove")
@click.argument("name")
@with_url
@with_json
@_FOLDER
def _remove(name: str, url: str | None, as_json: bool, folder: str | None) -> int:
    """Delete NAME; a run that still needs it fails."""

    def perform() -> int:
        _datasets(url).delete(name, url=folder)
        told(f"{name}: deleted", {"name": name, "deleted": True}, as_json=as_json)
        return OK

    return _found(perform)


@data.command("check")
@click.argument("name")
@with_url
@with_json
@_FOLDER
def _check(name: str, url: str | None, as_json: bool, folder: str | None) -> int:
    """Read all of NAME from where it is stored, and compare its chunks with their digests."""

    def perform() -> int:
        found = _datasets(url).check(name, url=folder)
        said = f"{name}: all {found.samples:,} samples are there and whole"
        told(said, {**asdict(found), "whole": True}, as_json=as_json)
        return OK

    return _found(perform)


def _found(perform: Any) -> int:
    """As `guarded`; exit code 3 where there is no such dataset."""

    def performed() -> int:
        try:
            return int(perform())
        except DatasetMissing as error:
            click.echo(f"error: {error}", err=True)
            return NOT_FOUND

    return guarded(performed)


def _read(source: str) -> Any:
    """What SOURCE stands for.

    Raises:
        InvalidInput: it is nothing that can be read.
    """
    module, _, name = source.partition(":")
    path = Path(source)
    if name and not path.exists():
        find_modules_here()
        try:
            return getattr(importlib.import_module(module), name)()
        except (ImportError, AttributeError) as error:
            raise InvalidInput(f"{source!r} cannot be imported from here: {error}") from error
    try:
        return read_arrays(path)
    except InvalidInput:
        raise
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{source!r} cannot be read: {error}") from error


def read_arrays(path: Path) -> Any:
    """The array or tensors of a file.

    Raises:
        InvalidInput: its ending is none of .npy, .npz and .safetensors.
        OSError, ValueError: it cannot be read; no file is unpickled.
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    kind = path.suffix.lower()
    if kind == ".npy":
        return np.load(path, allow_pickle=False)
    if kind == ".npz":
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    if kind == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    raise InvalidInput(f"{path.name!r} is no file .npy, .npz or .safetensors, and no MODULE:FUNCTION")
