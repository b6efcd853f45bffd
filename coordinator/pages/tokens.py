"""Tokens of programs that use the REST interface: of each the server knows a digest alone."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from torchord.cache.errors import InvalidInput

SCOPES = ("read", "predict", "write")
"""What a token permits; each permits what comes before it, too."""

_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,99}):(read|predict|write):([0-9a-f]{64})")
_BYTES = 32


@dataclass(frozen=True)
class Holder:
    """Whose token it is.

    Attributes:
        name: for the log.
        scope: one of `SCOPES`.
    """

    name: str
    scope: str

    def may(self, scope: str) -> bool:
        """Whether the token permits this."""
        return SCOPES.index(scope) <= SCOPES.index(self.scope)


class Tokens:
    """The tokens that a server admits.

    Args:
        text: NAME:SCOPE:DIGEST, with commas or lines between them; a line that begins with # is none.

    Raises:
        InvalidInput: a part is of another form. The message does not show it.
    """

    def __init__(self, text: str) -> None:
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        parts = [part.strip() for line in lines for part in line.split(",") if part.strip()]
        self._known: list[tuple[bytes, Holder]] = []
        for place, part in enumerate(parts, 1):
            found = _LINE.fullmatch(part)
            if found is None:
                raise InvalidInput(
                    f"TORCHORD_API_TOKENS: entry {place} is not NAME:SCOPE:DIGEST, as `torchord token NAME` "
                    "prints it"
                )
            self._known.append((bytes.fromhex(found[3]), Holder(found[1], found[2])))

    def __bool__(self) -> bool:
        return bool(self._known)

    def holder(self, token: str) -> Holder | None:
        """Whose token it is, None if nobody's; takes as long for the one as for the other."""
        given, found = hashlib.sha256(token.encode("utf-8", "replace")).digest(), None
        for digest, holder in self._known:
            if hmac.compare_digest(digest, given):
                found = holder
        return found


def made(name: str, scope: str) -> tuple[str, str]:
    """A new token, and the entry by which a server admits it.

    The digest needs no salt: the token is 256 random bits, which nobody finds by trying.

    Raises:
        InvalidInput: the name is none.
    """
    token = secrets.token_urlsafe(_BYTES)
    entry = f"{name}:{scope}:{hashlib.sha256(token.encode()).hexdigest()}"
    if _LINE.fullmatch(entry) is None:
        raise InvalidInput(f"{name!r} cannot name a token; use letters, digits, '.', '_' and '-'")
    return token, entry
