"""How the parts of a compressed tensor are named and laid out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch

Layout: TypeAlias = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""The parts of a compressed tensor: name -> (dtype, shape)."""
