"""Kills, hangs and losses at every point of the protocol; each must end in the undisturbed run's bits."""
