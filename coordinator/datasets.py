"""Stored datasets as recipes name them: `dataset=partial(stored_dataset, name="digits")`.

The function lives under this name because specs on disk carry it. What puts, lists and opens datasets is
`torchord.cache.datasets.datasets`.
"""

from __future__ import annotations

from torchord.cache.datasets.datasets import Datasets
from torchord.cache.datasets.reader import StoredDataset
from torchord.cache.settings import from_environment


def stored_dataset(name: str, *, url: str | None = None, digest: str | None = None) -> StoredDataset:
    """A stored dataset, for a recipe: `dataset=partial(stored_dataset, name="digits")`.

    It is looked for where this process's environment says (TORCHORD_URL, TORCHORD_CACHE_URLS, and
    what `celery -b` was given). Every worker admits this function, whatever its allow-list.

    Args:
        name: what it was put under.
        url: the folder that it was put in, if that was not the cache.
        digest: pins the content, see `DatasetInfo.digest`.

    Raises:
        DatasetMissing: there is none of that name.
        DatasetChanged: the name stands for other content than pinned.
        DatasetDamaged: its manifest is missing or damaged.
        CacheUnreachable: a server does not answer.
    """
    return Datasets(from_environment()).open(name, url=url, digest=digest)
