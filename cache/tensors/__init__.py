"""Tensors and nested states as bytes, and bytes cut into pieces."""
