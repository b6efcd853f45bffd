"""Which directories vouch for the code in them.

By default a worker admits what lies under the directory that it was started in. That says something only
where nobody else can put files: not in a directory that others write to, in the root of the file system, in
one for temporary files, or in a home directory, where downloads land.
"""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from torchord.coordinator.local_cluster.import_path import is_checkout

OWN_FOLDERS = ("tests", "benchmarks", "examples", "coordinator", "cache", "tasks", "torchord", "docs")
"""Folders of a checkout of torchord: what lies in them is a recipe where the allow-list names it."""

_HOMES = (Path("/home"), Path("/Users"))
_NO_SHELL = frozenset({"nologin", "false", "sync", ""})


def doubt(directory: Path) -> str:
    """Why what lies under a directory is not admitted unasked, in words; "" if it is.

    Example:
        >>> doubt(Path("/"))
        'is the root of the file system'
    """
    directory = directory.resolve()
    if directory == Path(directory.anchor):
        return "is the root of the file system"
    temporary = {Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp"), Path("/dev/shm")}
    if directory in {place.resolve() for place in temporary}:
        return "is for temporary files"
    if directory in _HOMES or directory.parent in _HOMES or directory in _own_homes():
        return "is a home directory"
    if others_write(directory):
        return "can be written by others"
    for above in directory.parents:
        if others_write(above) and not above.stat().st_mode & stat.S_ISVTX:
            return f"can be replaced by whoever writes to {above}"
    return ""


def others_write(path: Path) -> bool:
    """Whether a file or directory can be written by others than its owner and those of its own group.

    Its own group is this process's, or the one that has the number of the owner, as private groups have.
    """
    try:
        found = path.stat()
        by_group = found.st_mode & stat.S_IWGRP and found.st_gid not in {os.getegid(), found.st_uid}
        if not by_group and not found.st_mode & stat.S_IWOTH:
            return False
        return not os.statvfs(path).f_flag & os.ST_RDONLY  # as a container's mounted settings are
    except OSError:
        return True


def is_torchords_own(file: Path, directory: Path) -> bool:
    """Whether a file below a directory is a part of a checkout of torchord, its tests and examples included.

    Not where the directory lies in that part: whoever starts a worker there means it.
    """
    for root in (parent for parent in file.parents if parent.is_relative_to(directory)):
        if file.relative_to(root).parts[0] in OWN_FOLDERS and is_checkout(root):
            return True
    return False


def _own_homes() -> Iterator[Path]:
    """The home of whoever runs this; that of a service, which nobody logs in to, holds its program."""
    try:
        entry = pwd.getpwuid(os.geteuid())
    except KeyError:  # a user id of a container
        return
    if os.path.basename(entry.pw_shell) in _NO_SHELL:
        return
    yield Path(entry.pw_dir).resolve()
    yield Path.home().resolve()
