"""Runs in Flower: pages about runs beside Flower's own, and tasks in words."""
