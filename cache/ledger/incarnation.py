"""The id of a run's life: `LIFE[.REVISION][+SWITCHES]`, and what of it stays when something changes.

A name that is submitted anew begins another life. A correction of the recipe's code makes the next
revision, a live switch of the config counts one up: what was computed before is told from what comes after.
"""

from __future__ import annotations


def life(incarnation: str) -> str:
    """The part of an incarnation that all its revisions share: names what outlives a correction."""
    return revision(incarnation).partition(".")[0]


def revision(incarnation: str) -> str:
    """The part of an incarnation that a switch of the config leaves alone: slots are computed for it."""
    return incarnation.partition("+")[0]


def revised(incarnation: str) -> str:
    """The incarnation's next revision, after its recipe's code was corrected.

    Example:
        >>> revised("5e1f"), revised("5e1f.1+3")
        ('5e1f.1', '5e1f.2+3')
    """
    before, plus, switches = incarnation.partition("+")
    name, _, number = before.partition(".")
    return f"{name}.{int(number or 0) + 1}{plus}{switches}"


def switched(incarnation: str) -> str:
    """The incarnation after one more live switch of the config.

    Example:
        >>> switched("5e1f"), switched("5e1f.1+3")
        ('5e1f+1', '5e1f.1+4')
    """
    before, _, switches = incarnation.partition("+")
    return f"{before}+{int(switches or 0) + 1}"
