"""What a collate leaves of its samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from torchord.coordinator.compute.filtering import collated

PAIR = (torch.ones(3), 1)


def present(samples: list[Any]) -> Any:
    return default_collate([sample for sample in samples if sample is not None])


def columns(samples: list[Any]) -> Any:
    return tuple(zip(*(sample for sample in samples if sample is not None), strict=True))


def short(samples: list[Any]) -> Any:
    return default_collate([sample for sample in samples if sample["n"] < 3])


def packed(samples: list[Any]) -> dict[str, torch.Tensor]:
    """All in one row, as for attention over documents that lie one after the other."""
    return {"tokens": torch.cat([torch.arange(sample) for sample in samples])[None]}


def paired(samples: list[Any]) -> torch.Tensor:
    return torch.stack([one + other for one, other in zip(samples[::2], samples[1::2], strict=True)])


def twice(samples: list[Any]) -> torch.Tensor:
    return torch.stack([sample for sample in samples for _ in range(2)])


@pytest.mark.parametrize(
    ("collate", "samples", "kept"),
    [
        (present, [PAIR, PAIR], None),
        (present, [PAIR, None, PAIR], 2),
        (present, [None, None, PAIR], 1),
        (present, [None, None], 0),
        (columns, [(torch.ones(3, 4, 4), {"boxes": torch.ones(n, 4)}) for n in (2, 5)] + [None], 2),
        (columns, [None, None], 0),
        (short, [{"n": n, "name": str(n), "x": np.ones(2)} for n in range(5)], 3),
        (packed, [3, 4], None),
        (paired, [torch.ones(2)] * 4, None),
        (twice, [torch.ones(2)] * 4, None),
        (lambda samples: None if not any(samples) else present(samples), [None], 0),
        (lambda samples: torch.zeros(()), [1, 2], None),
    ],
)
def test_what_is_left_is_counted_where_it_can_be_told(
    collate: Any, samples: list[Any], kept: int | None
) -> None:
    assert collated(samples, collate)[1] == kept


def test_a_collate_that_fails_otherwise_says_so() -> None:
    with pytest.raises(TypeError, match="NoneType"):
        collated([PAIR, None], default_collate)
