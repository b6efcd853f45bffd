"""Folders of files that are written whole, in a directory or at any fsspec URL.

Every failure is a `CheckpointError`, since checkpoints are what is kept in them.
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from torchord.cache.errors import CheckpointError, CheckpointsUnavailable
from torchord.cache.servers.address import masked


class Files(ABC):
    """A flat folder of files that are written whole. Every failure is a CheckpointError."""

    path: str

    def where(self, name: str) -> str:
        """Return the full path or URL of a file."""
        return f"{self.path}/{name}"

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of all files; none if the folder does not exist."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Return the names of all folders in it; none if it does not exist."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return a file's content."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a file, replacing one of that name."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a file if it exists."""


def open_folder(root: str, folder: str) -> Files:
    """Return the folder below a directory or fsspec URL; it need not exist.

    Raises:
        CheckpointError: no fsspec driver serves the URL.
    """
    if root.startswith("file://"):
        root = root.removeprefix("file://")
    return RemoteFiles(root, folder) if "://" in root else LocalFiles(Path(root) / folder)


def _cannot_write(where: str, error: Exception) -> CheckpointsUnavailable:
    return CheckpointsUnavailable(
        f"cannot write {where}: {error}. Give a checkpoint_dir that the training server can write to, or set "
        "TORCHORD_CHECKPOINT_DIR there"
    )


class LocalFiles(Files):
    """A directory. Writing goes to a temporary file that is synced and then renamed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.path = str(directory)

    def names(self) -> list[str]:
        """Return the names of all files; none if the folder does not exist."""
        return self._listed(os.DirEntry.is_file)

    def folders(self) -> list[str]:
        """Return the names of all folders in it; none if it does not exist."""
        return self._listed(os.DirEntry.is_dir)

    def _listed(self, wanted: Callable[[os.DirEntry[str]], bool]) -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self._directory) if wanted(entry))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointsUnavailable(f"cannot list {self.path}: {error}") from error

    def read(self, name: str) -> bytes:
        """Return a file's content."""
        try:
            return (self._directory / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {self.where(name)}: {error}") from error

    def write(self, name: str, data: bytes) -> None:
        """Write a file, replacing one of that name."""
        temporary: str | None = None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=self._directory)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._directory / name)
            self._sync_directory()
        except OSError as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            raise _cannot_write(self.where(name), error) from error

    def _sync_directory(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, name: str) -> None:
        """Delete a file if it exists."""
        try:
            (self._directory / name).unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_write(self.where(name), error) from error


class RemoteFiles(Files):
    """A folder at an fsspec URL, where one upload is one whole object."""

    def __init__(self, root: str, folder: str) -> None:
        import fsspec

        path = "/".join(part for part in (root.rstrip("/"), folder) if part)
        self.path = masked(path)
        try:
            self._filesystem, self._base = fsspec.core.url_to_fs(path)
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"cannot open {self.path}: {error}") from error

    def names(self) -> list[str]:
        """Return the names of all files; none if the folder does not exist."""
        return self._listed("file")

    def folders(self) -> list[str]:
        """Return the names of all folders in it; none if it does not exist."""
        return self._listed("directory")

    def _listed(self, wanted: str) -> list[str]:
        try:
            self._filesystem.invalidate_cache()
            entries = self._filesystem.ls(self._base, detail=True)
        except FileNotFoundError:
            return []
        except Exception as error:  # every driver has exceptions of its own
            raise CheckpointsUnavailable(f"cannot list {self.path}: {error}") from error
        return sorted(
            entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == wanted
        )

    def read(self, name: str) -> bytes:
        """Return a file's content."""
        try:
            data: bytes = self._filesystem.cat_file(f"{self._base}/{name}")
            return data
        except Exception as error:
            raise CheckpointError(f"cannot read {self.where(name)}: {error}") from error

    def write(self, name: str, data: bytes) -> None:
        """Write a file, replacing one of that name."""
        try:
            self._filesystem.makedirs(self._base, exist_ok=True)
            self._filesystem.pipe_file(f"{self._base}/{name}", data)
        except Exception as error:
            raise _cannot_write(self.where(name), error) from error

    def remove(self, name: str) -> None:
        """Delete a file if it exists."""
        try:
            self._filesystem.rm_file(f"{self._base}/{name}")
        except FileNotFoundError:
            return
        except Exception as error:
            raise _cannot_write(self.where(name), error) from error
