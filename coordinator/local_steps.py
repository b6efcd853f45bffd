"""The outer optimizers that recipes name: `outer_optimizer="torchord.coordinator.local_steps:diloco"`.

They live under this name because specs on disk carry it. The mathematics is in
`torchord.coordinator.compute.inner_steps`.
"""

from __future__ import annotations

from functools import partial

import torch

averaging = partial(torch.optim.SGD, lr=1.0)
"""The outer optimizer of Local SGD: the new version is the mean of the shards' weights."""

diloco = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
"""The outer optimizer of DiLoCo (Douillard et al., arXiv 2311.08105), with the paper's values."""
