"""A run's tensors under its records: versions, gradients, slot states and predictions."""
