"""A stored dataset that writes down what was read of it, for tests that ask other processes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from torchord import stored_dataset


class Noted(Dataset[Any]):
    """A stored dataset; after each access `folder/<pid>.json` holds its counters and all indices so far."""

    def __init__(self, name: str, folder: str) -> None:
        self.inner = stored_dataset(name)
        self.digest = self.inner.digest
        self.note = Path(folder) / f"{os.getpid()}.json"
        self.indices: set[int] = set()

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        found = self.inner.__getitems__(indices)
        self.indices.update(indices)
        counters = self.inner.counters
        text = json.dumps(
            {"indices": sorted(self.indices), "fetched": counters.fetched, "nbytes": counters.fetched_nbytes}
        )
        temporary = self.note.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(self.note)
        return found
