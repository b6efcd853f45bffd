"""A run's tensors under its records: versions, gradients and slot states."""
