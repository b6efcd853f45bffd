"""Fashion-MNIST from the IDX files of Debian's package `dataset-fashion-mnist`, for recipes of benchmarks."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

DATA = Path("/usr/share/datasets/fashion-mnist")


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


def images(folder: str | Path, prefix: str, last: int | None = None) -> TensorDataset:
    """The first images of a part, "train" or "t10k", with their classes."""
    pixels = read_idx(Path(folder) / f"{prefix}-images-idx3-ubyte")[:last]
    labels = read_idx(Path(folder) / f"{prefix}-labels-idx1-ubyte")[:last]
    return TensorDataset((pixels.unsqueeze(1).float() / 255 - 0.286) / 0.353, labels.long())
