"""Storage of torchord: tensors, versions, gradient slots and the ledger, in a Redis-compatible server."""
