"""Fashion-MNIST from the IDX files of Debian's package `dataset-fashion-mnist`, for recipes of benchmarks."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

DATA = Path("/usr/share/datasets/fashion-mnist")

SECTIONS = {
    "train": ("train", 0, None),
    "fit": ("train", 0, 50_000),
    "validation": ("train", 50_000, None),
    "test": ("t10k", 0, None),
}


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of examples whose largest output is their class."""
    return (outputs.argmax(1) == targets).float().mean()


def read_idx(path: Path) -> Tensor:
    """An IDX file, gzipped or not, as a uint8 tensor."""
    packed = path.with_name(path.name + ".gz")
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", dimensions, 4).astype(int)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy())


def images(folder: str | Path, prefix: str, last: int | None = None, *, first: int = 0) -> TensorDataset:
    """The images `first` to `last` of a part, "train" or "t10k", with their classes."""
    pixels = read_idx(Path(folder) / f"{prefix}-images-idx3-ubyte")[first:last]
    labels = read_idx(Path(folder) / f"{prefix}-labels-idx1-ubyte")[first:last]
    return TensorDataset((pixels.unsqueeze(1).float() / 255 - 0.286) / 0.353, labels.long())


def section(folder: str, name: str, last: int | None = None) -> TensorDataset:
    """Images of "train" (60,000), of its "fit" (50,000) or "validation" (10,000), or of "test" (10,000)."""
    prefix, first, end = SECTIONS[name]
    return images(folder, prefix, end if last is None else last, first=first)
