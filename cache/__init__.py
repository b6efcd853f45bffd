"""Storage of torchord: tensors, versions, gradient slots and the ledger, in a Redis-compatible server."""

if not __name__.startswith("torchord."):  # a checkout's folder, imported by its own name
    from torchord.doors import open_door

    open_door(__name__)
