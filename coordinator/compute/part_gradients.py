"""Whether the gradient of a batch is the mean of its parts' gradients, as its loss is of theirs.

A loss that is a mean has a gradient that is one, unless something in the backward looks at the whole: a
hook that clips a gradient, an embedding that divides by how often a row was asked for, a backward by hand.
Elements spread over each parameter are compared, so that of large models little is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchord.cache.errors import InvalidInput

_ELEMENTS = 65_536  # of each parameter
_FAR = {"fp32": 1e-2, "bf16": 0.2, "fp16": 0.2}  # of a parameter's gradient: a ReLU may switch by rounding
_SMALL = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}  # of the whole gradient: what may be rounding alone
_TIMES_ROUNDING = 20


def sampled(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Elements of each gradient, at odd distances so that all columns are met, in double precision."""
    found = {}
    for name, gradient in gradients.items():
        flat = gradient.resolve_conj().reshape(-1)
        flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
        found[name] = flat[:: (flat.numel() // _ELEMENTS) | 1].to(torch.float64, copy=True)
    return found


def require_mean(
    whole: Mapping[str, Tensor],
    reordered: Mapping[str, Tensor],
    parts: Sequence[tuple[Mapping[str, Tensor], float]],
    precision: str,
) -> None:
    """Refuse a gradient that is not put together from its parts'.

    Args:
        whole: parameter name -> elements of the batch's gradient, as `sampled`.
        reordered: the same of the batch in another order, which is what rounding makes.
        parts: of each part the same, and by what it is multiplied in the sum.
        precision: the config's.

    Raises:
        InvalidInput: names the first parameter whose gradient is another.
    """
    size = float(torch.stack([g.norm() for g in whole.values()]).norm()) if whole else 0.0
    for name, gradient in whole.items():
        shares = [part[name] * factor for part, factor in parts if name in part]
        if not all(map(bool, (torch.isfinite(g).all() for g in (gradient, *shares)))):
            continue
        scale = max([float(gradient.norm()), *(float(share.norm()) for share in shares)])
        noise = float((gradient - reordered[name]).norm()) if name in reordered else scale
        allowed = max(_FAR[precision] * scale, _SMALL[precision] * size, _TIMES_ROUNDING * noise)
        apart = float((gradient - sum(shares, torch.zeros_like(gradient))).norm())
        if apart > allowed:
            raise InvalidInput(
                "the gradient of a batch is not the mean of its parts' gradients, though its loss is that of "
                f"theirs: that of {name!r} is off by {apart / scale:.2g} of its norm, so no step would be "
                "that of the whole batch; clip or rescale gradients by Recipe(gradients=...), which gets the "
                "batch's, in place of hooks (register_hook), make embeddings without scale_grad_by_freq, or "
                "declare with Recipe(loss_over='shard') that you mean what each shard's backward gives"
            )
