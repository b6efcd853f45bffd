"""Tests of torchord."""
