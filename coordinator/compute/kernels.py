"""What is said of an operator that a deterministic run cannot use."""

from __future__ import annotations

import re

from torchord.cache.errors import InvalidInput

_ALERT = re.compile(r"^(\S+) does not have a deterministic implementation")

_REPLACEMENTS = {  # beginnings of torch's names for them
    "adaptive_avg_pool": "avg_pool with a fixed kernel, or mean() for one value a channel",
    "adaptive_max_pool": "max_pool with a fixed kernel, or amax() for one value a channel",
    "ctc_loss": "ctc_loss on outputs.cpu()",
    "embedding_bag": "embedding, and a sum of its rows",
    "histc": "one_hot(bucketize(x, edges)) and a sum",
    "kthvalue": "sort",
    "max_unpool": "interpolate, or a transposed convolution",
    "median": "sort",
    "nll_loss2d": "gather of log_softmax",
    "put_": "index_put, or scatter",
    "reflection_pad": "indexing with an index that is reflected",
    "replication_pad": "indexing with an index that is clamped",
}


def worded(error: BaseException) -> BaseException:
    """An error as a recipe's author needs it: torch's alert with the ways on, any other as it is.

    torch raises the alert wherever an operator without a deterministic implementation on its device is
    called under `torch.use_deterministic_algorithms`, the backward included.
    """
    found = _ALERT.match(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return error
    name = found[1]
    instead = next((use for begins, use in _REPLACEMENTS.items() if name.startswith(begins)), None)
    replacement = "write it with others" if instead is None else f"use {instead} in its place"
    return InvalidInput(
        f"the operator {name} has no deterministic implementation on this device: {replacement}; or, if it "
        'was met on a GPU, let workers without one compute (CUDA_VISIBLE_DEVICES=""), where most have one; '
        "or set deterministic=False, with which a shard that is computed twice may give other bytes, so that "
        "weights depend on the fleet, and verify() and a restored run may not agree with what there was"
    )
