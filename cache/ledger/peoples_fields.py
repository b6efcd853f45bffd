"""Fields of a run's head that people set: tags, notes, and its share of the fleet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torchord.cache.errors import InvalidInput, RecordDamaged
from torchord.cache.reading import parsed

MOST_TAGS = 32
MOST_TAG = 100
MOST_NOTES = 10_000


def checked_tags(tags: Iterable[Any]) -> tuple[str, ...]:
    """Tags, sorted, each once.

    Raises:
        InvalidInput: one is no printable text of 1 to 100 characters, or there are more than 32.
    """
    if isinstance(tags, str):
        raise InvalidInput(f"tags are a list of texts, not the text {tags!r:.60}; write [{tags!r:.60}]")
    found = list(tags)
    for tag in found:
        if not isinstance(tag, str) or not 0 < len(tag) <= MOST_TAG or not tag.isprintable():
            raise InvalidInput(f"a tag is a printable text of 1 to {MOST_TAG} characters, not {tag!r:.120}")
    if len(set(found)) > MOST_TAGS:
        raise InvalidInput(f"{len(set(found))} tags are too many for one run; at most {MOST_TAGS} are kept")
    return tuple(sorted(set(found)))


def checked_notes(notes: Any) -> str:
    """Notes.

    Raises:
        InvalidInput: they are no text of at most 10,000 characters.
    """
    if not isinstance(notes, str) or len(notes) > MOST_NOTES:
        raise InvalidInput(f"notes are a text of at most {MOST_NOTES} characters, not {notes!r:.60}")
    return notes


def tags_of(text: str) -> tuple[str, ...]:
    """The tags that a head has."""
    try:
        return checked_tags(parsed(text, "the tags of a run")) if text else ()
    except (InvalidInput, TypeError) as error:
        raise RecordDamaged(f"field 'tags' of a run's head is no list of tags ({error!s:.100})") from None


def fields_of(head: Mapping[str, str]) -> dict[str, Any]:
    """These fields as `Head` has them, with what they are where a head has none.

    Raises:
        RecordDamaged: one is none; the message names it.
    """
    try:
        weight, priority = float(head.get("weight", 1.0)), int(head.get("priority", 0))
    except ValueError:
        raise RecordDamaged("weight and priority of a run's head are no numbers") from None
    tags, notes = tags_of(head.get("tags", "")), head.get("notes", "")
    return {"weight": weight, "priority": priority, "tags": tags, "notes": notes}
