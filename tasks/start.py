"""What a worker does at its start so that recipes are found, and what it tells whoever started it."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version

from torchord.cache.servers.address import masked
from torchord.cache.settings import Settings
from torchord.coordinator.local_cluster.import_path import beyond_installation
from torchord.coordinator.messages.task_names import GRADIENTS, UPDATES
from torchord.coordinator.spec.admission import Admission

ROLES = {UPDATES: "training server", GRADIENTS: "Client"}
WORK = {"training server": "updates", "Client": "shards, evaluations and predictions"}


def import_from_working_directory() -> None:
    """Let this process, and the pool that it starts, import modules of the directory that it stands in.

    Last on the path, so that nothing in it hides an installed module. To be called once Celery has found the
    app: until then it has the directory on the path itself, and takes it away afterwards.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)


def announce(settings: Settings) -> None:
    """Print which recipes the worker admits, where it looks for their modules, and whom it serves: two lines.

    And a third where it was started in a directory that vouches for nothing.

    To where Celery prints its banner, which follows.
    """
    admission = Admission(settings.allowed_modules)
    places = ", ".join(map(str, beyond_installation()))
    if sys.__stdout__ is not None:
        sys.__stdout__.write(
            f"torchord: serves {masked(settings.url)}; recipes may use {admission.describe()} "
            f"(TORCHORD_ALLOWED_MODULES={','.join(admission.listed)})\n"
            f"torchord: besides what is installed, modules are looked for in {places or 'no directory'}\n"
            + (f"torchord: {admission.warning}\n" if admission.warning else "")
        )
        sys.__stdout__.flush()


def introduce(settings: Settings, node: str, queues: tuple[str, ...], *, forks: bool) -> None:
    """Print what this worker is: release, role and queues, device, directories, and what it waits for.

    Args:
        node: its name.
        queues: those that it consumes.
        forks: whether its children compute, each on a device of its own, and it does not.
    """
    if sys.__stdout__ is None:
        return
    roles = [name for queue, name in ROLES.items() if queue in queues]
    computes = "each process of the pool on its own device" if forks else _device()
    lines = (
        f"{version('torchord')}, {' and '.join(roles) or 'worker'} {node}, queues {', '.join(queues)}",
        f"torch {version('torch')}; computes on {computes}",
        f"works in {os.getcwd()}, checkpoints are in {settings.checkpoint_dir}",
        f"waits for {' and '.join(WORK[role] for role in roles) or 'nothing'} of any run",
    )
    sys.__stdout__.write("".join(f"torchord: {line}\n" for line in lines))
    sys.__stdout__.flush()


def _device() -> str:
    from torchord.coordinator.runtime.environment import environment

    return environment().partition(", ")[2]
