"""The mathematics: examples to gradient, gradients to version; no Redis, no clock, no files."""
