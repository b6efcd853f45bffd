"""The supervisor: finds work, messages and processes that were lost, for all runs."""
