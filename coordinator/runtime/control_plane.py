"""Connections to the control plane of any run: what needs no tensors, and so does not load torch."""

from __future__ import annotations

from torchord.cache.keyring import NO_KEYS, keyring
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.runs import Runs
from torchord.cache.ledger.workers import Registry
from torchord.cache.servers.fast_client import Lane
from torchord.cache.servers.redis_client import CLIENT_PATIENCE_SECONDS, Clients, ping
from torchord.cache.settings import Settings

_LEDGERS_KEPT = 64


class ControlPlane:
    """Connections of one process; a forked child makes its own.

    Args:
        settings: where the servers are.
        patience_seconds: how long an operation waits for a server that is away.

    Attributes:
        keyring: the process's keys.
        file_keyring: those of them that hold for files, too.
    """

    def __init__(self, settings: Settings, *, patience_seconds: float = CLIENT_PATIENCE_SECONDS) -> None:
        self.settings = settings
        self.keyring = keyring(settings.keys, settings.url)
        self.file_keyring = NO_KEYS if self.keyring.local else self.keyring
        self.patience_seconds = patience_seconds
        self._clients = Clients()
        self.lane = Lane(settings.url)
        self._ledgers: dict[str, Ledger] = {}

    @property
    def registry(self) -> Registry:
        """The registry of living workers."""
        url = self.settings.url
        return Registry(self._clients.get(url, self.patience_seconds), url)

    @property
    def runs(self) -> Runs:
        """The registry of runs."""
        url = self.settings.url
        return Runs(self._clients.get(url, self.patience_seconds), url)

    def require_reachable(self) -> None:
        """Ask the server of the control plane for a sign of life.

        Raises:
            CacheUnreachable: within seconds, if nothing answers.
        """
        url = self.settings.url
        ping(self._clients.get(url, self.patience_seconds), url)

    def ledger(self, run: str) -> Ledger:
        """The control plane of one run, made at first use."""
        url = self.settings.url
        client = self._clients.get(url, self.patience_seconds)
        found = self._ledgers.get(run)
        if found is None or found.client is not client:
            if len(self._ledgers) >= _LEDGERS_KEPT:
                self._ledgers.clear()
            found = self._ledgers[run] = Ledger(client, url, run, lane=self.lane, keyring=self.keyring)
        return found
