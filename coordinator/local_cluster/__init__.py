"""A whole cluster on this machine: embedded server, guardian, workers."""
