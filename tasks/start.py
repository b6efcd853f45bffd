"""What a worker does at its start so that recipes are found, and what it tells whoever started it."""

from __future__ import annotations

import os
import sys

from torchord.cache.servers.address import masked
from torchord.cache.settings import Settings
from torchord.coordinator.local_cluster.import_path import beyond_installation
from torchord.coordinator.spec.admission import Admission


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
