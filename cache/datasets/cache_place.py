"""Stored datasets in the cache: records in the control plane, chunks over the cache nodes, all with a TTL."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import redis

from torchord.cache import keys
from torchord.cache.blobs.chunk_store import ChunkStore
from torchord.cache.datasets.content import Bytes, Chunk, ContentStore
from torchord.cache.datasets.record import Record, Verdict, renewal_seconds, require_address
from torchord.cache.errors import DatasetDamaged
from torchord.cache.keyring import keyring
from torchord.cache.scripts import source
from torchord.cache.servers.redis_client import CLIENT_PATIENCE_SECONDS, Clients, translated
from torchord.cache.settings import Settings

_log = logging.getLogger(__name__)


class CachePlace:
    """Datasets in the cache.

    Deleting is safe beside a put that shares chunks, without a lock: chunks that nobody names are
    given a grace of some seconds, then the records are read again, and what has been named
    meanwhile gets its life back. A put looks at its chunks once more after it has named them.

    Args:
        settings: where the servers are.
        patience_seconds: how long an operation waits for a control plane that is away.
    """

    def __init__(self, settings: Settings, *, patience_seconds: float = CLIENT_PATIENCE_SECONDS) -> None:
        self._url = settings.url
        self._patience_seconds = patience_seconds
        self._clients = Clients()
        self._store = ContentStore(ChunkStore.of(settings))
        self._keyring = keyring(settings.keys, settings.url)

    @property
    def label(self) -> str:
        """Where, for messages."""
        return "the cache"

    @property
    def _client(self) -> redis.Redis:
        return self._clients.get(self._url, self._patience_seconds)

    def extend(self, chunks: Sequence[Chunk], ttl_seconds: int) -> list[bool]:
        """See `ContentStore.extend`."""
        return self._store.extend(chunks, ttl_seconds)

    def write(self, items: Sequence[tuple[Chunk, memoryview]], ttl_seconds: int) -> None:
        """See `ContentStore.write`."""
        self._store.write(items, ttl_seconds)

    def read(self, chunks: Sequence[Chunk]) -> list[Bytes]:
        """See `ContentStore.read`."""
        found = self._store.read(chunks)
        if self._keyring and not self._keyring.local:
            for chunk, data in zip(chunks, found, strict=True):
                require_address(chunk, data.data, f"chunk {chunk.address} in {self.label}")
        return found

    def mark(self, chunks: Sequence[Chunk]) -> None:
        """See `ContentStore.let_go`."""
        self._store.let_go(chunks)

    def sweep(self, chunks: Sequence[Chunk]) -> None:
        """Nothing to do: marked chunks expire."""

    def record(self, name: str) -> Record | None:
        """The record of a name.

        Raises:
            DatasetDamaged: it cannot be read.
            CacheUnreachable: the control plane does not answer.
        """
        key = keys.dataset(name)
        with translated(self._url, f"look up dataset {name!r}"):
            text = cast("str | None", self._client.hget(key, "record"))
        return None if text is None else self._opened(name, text)

    def records(self) -> list[Record]:
        """All records, by time of their put; one that cannot be read is logged and left out.

        Raises:
            CacheUnreachable: the control plane does not answer.
        """
        with translated(self._url, "list the datasets"):
            names = cast("list[str]", self._client.zrange(keys.DATASETS, 0, -1))
            pipe = self._client.pipeline(transaction=False)
            for name in names:
                pipe.hget(keys.dataset(name), "record")
            texts = pipe.execute()
        found = []
        for name, text in zip(names, texts, strict=True):
            if text is None:
                self._drop(name, delete=False)
                continue
            try:
                found.append(self._opened(name, text))
            except DatasetDamaged as error:
                _log.warning("%s", error)
        return found

    def commit(self, record: Record, *, replace: bool) -> tuple[Verdict, Record | None]:
        """Give a name its record in one script.

        Returns:
            "written" (and the record that was replaced, if any), "same" if this content had the
            name already, or "exists" if other content has it and `replace` is False.

        Raises:
            CacheUnreachable: the control plane does not answer.
        """
        key = keys.dataset(record.name)
        with translated(self._url, f"name dataset {record.name!r}"):
            verdict, before = self._client.register_script(source("put_dataset"))(
                keys=[key, keys.DATASETS],
                args=[
                    record.name,
                    record.digest,
                    record.sealed(self._keyring),
                    record.ttl_seconds,
                    record.created_at,
                    int(replace),
                ],
            )
        try:
            return verdict, self._opened(record.name, before) if before else None
        except DatasetDamaged:
            return verdict, None  # then its chunks are left to expire

    def remove(self, name: str) -> None:
        """Take a record away; none is no error.

        Raises:
            CacheUnreachable: the control plane does not answer.
        """
        self._drop(name, delete=True)

    def renew(self, record: Record, chunks: Callable[[], Iterable[Chunk]]) -> None:
        """Prolong the life of a dataset; of all who ask within an hour, one does it.

        A record that has been replaced or deleted meanwhile is left alone, and so are its chunks.

        Raises:
            CacheError: a server does not answer or refuses.
        """
        key = keys.dataset(record.name)
        with translated(self._url, f"renew dataset {record.name!r}"):
            mark = {"nx": True, "ex": renewal_seconds(record.ttl_seconds)}
            if self._client.hget(key, "digest") != record.digest or not self._client.set(
                keys.dataset_renewed(record.name),
                record.digest,
                **mark,  # type: ignore[arg-type]  # redis-py types each keyword by itself
            ):
                return
            self._client.expire(key, record.ttl_seconds, gt=True)
            self._client.expire(keys.DATASETS, record.ttl_seconds, gt=True)
        present = self._store.extend(list(chunks()), record.ttl_seconds)
        if not all(present):
            _log.warning("dataset %r has lost %d chunks", record.name, present.count(False))

    def _opened(self, name: str, text: str) -> Record:
        return Record.opened(name, text, f"key {keys.dataset(name)}", self._keyring)

    def _drop(self, name: str, *, delete: bool) -> None:
        with translated(self._url, f"delete dataset {name!r}"):
            self._client.register_script(source("drop_dataset"))(
                keys=[keys.dataset(name), keys.DATASETS], args=[name, int(delete)]
            )
