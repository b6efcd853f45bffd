"""Curves as pictures: SVG, PNG and characters of a terminal. Knows nothing of runs."""
