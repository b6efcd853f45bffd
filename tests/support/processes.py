"""The processes that a test's program or cluster started: finding them, and asking whether they live."""

from __future__ import annotations

import psutil

from torchord.cache.errors import CacheUnreachable, ServerNotFound
from torchord.cache.servers.redis_client import process_id
from torchord.coordinator.local_cluster.cluster import LocalCluster
from torchord.coordinator.local_cluster.embedded_server import EmbeddedServer, check_reachable

MARK = "TORCHORD_TEST_MARK"


def marked(mark: str) -> list[psutil.Process]:
    """Living processes whose environment holds MARK=`mark`, or whose directory has `mark` in its path.

    Every descendant inherits the environment; servers that set their process title overwrite theirs.
    """
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(MARK) == mark or mark in process.cwd()
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def describe(processes: list[psutil.Process]) -> str:
    """One line a process, for a failure message."""
    lines = []
    for process in processes:
        try:
            lines.append(f"{process.pid} {process.status()} {' '.join(process.cmdline())}")
        except psutil.NoSuchProcess:
            continue
    return "\n".join(lines)


def responds(server: EmbeddedServer) -> bool:
    """Whether the server answers now (or, given by URL, accepts a connection)."""
    if server.pid is not None:
        return process_id(server.url) == server.pid
    try:
        check_reachable(server.url)
        return True
    except (CacheUnreachable, ServerNotFound):
        return False


def guardian_pid(cluster: LocalCluster) -> int | None:
    """Process id of the cluster's guardian, None when stopped."""
    return None if cluster._guardian is None else cluster._guardian.pid
