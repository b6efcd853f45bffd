"""The ledger and the chunk store without a server, for tests; no product file imports it."""
