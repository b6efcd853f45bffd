"""The statement of a run that is done: what was trained, from what, to which weights, and the server's seal.

Whoever has the public keys can check it years later, without the run, its Redis or its machines: that these
weights are what a fleet with these keys made of this recipe and config, by this chain of steps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from torchord.cache.errors import InvalidInput, NotAuthentic
from torchord.cache.keyring import AnyKeyring, Places, bare
from torchord.cache.ledger.records import canonical
from torchord.cache.tensors.codec import dtype_name
from torchord.cache.tensors.halves import bits

_FORMAT = 1


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict, 64 hexadecimal digits.

    Of each tensor, in the order of the names: [name, dtype, shape] as JSON, a newline, and its elements in
    row-major order, little-endian.

    Args:
        tensors: name -> tensor, any dtype and shape, on the CPU.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(canonical([name, dtype_name(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(bits(tensor))
    return digest.hexdigest()


def statement(
    run: str,
    spec: Mapping[str, Any],
    *,
    version: int,
    chain: str,
    tensors: Mapping[str, Tensor],
    finished_at: float,
) -> str:
    """The text of a statement, without its seal.

    Args:
        spec: recipe, config and fingerprint of the code, as submitted.
        version: the last one.
        chain: of that version.
        tensors: its state dict.
        finished_at: Unix time (s).
    """
    return json.dumps(
        {
            "torchord_statement": _FORMAT,
            "run": run,
            "recipe": spec["recipe"],
            "config": spec["config"],
            "fingerprint": spec.get("fingerprint", ""),
            "switches": spec.get("switches", {}),
            "version": version,
            "chain": chain,
            "weights_sha256": weights_digest(tensors),
            "finished_at": finished_at,
        },
        allow_nan=False,
    )


def checked(path: Path, keyring: AnyKeyring, model: Path | None = None) -> dict[str, Any]:
    """What a statement says, once its seal holds, and the weights in a file are those that it names.

    Args:
        path: of the statement.
        keyring: with the keys to believe.
        model: a safetensors file to hold against it.

    Raises:
        InvalidInput: a file cannot be read or is none of these, or this process has no keys.
        NotAuthentic: the seal does not hold, or the weights are others.
    """
    if not keyring:
        raise InvalidInput(
            "a statement is checked with keys: point TORCHORD_KEYS at monitor.json of the fleet"
        )
    try:
        text = path.read_text(encoding="utf-8").strip()
        run = json.loads(bare(text))["run"]
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise InvalidInput(f"{path} is no statement of a run") from error
    said: dict[str, Any] = json.loads(keyring.opened("server", Places(str(run)).statement(), text))
    if model is None:
        return said
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = weights_digest(load_file(model))
    except (OSError, SafetensorError) as error:
        raise InvalidInput(f"{model} cannot be read as safetensors: {error}") from error
    if found != said["weights_sha256"]:
        raise NotAuthentic(
            f"the weights in {model} are not those of the statement: {found[:16]}… is their digest"
        )
    return said
