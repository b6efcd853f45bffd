"""Recipes made from what is written for other frameworks; none of them is imported here."""
