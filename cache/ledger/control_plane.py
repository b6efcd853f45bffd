"""One run's control keys on a server, and the two ways there: the lane and redis-py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

import redis

from torchord.cache import keys
from torchord.cache.blobs.content_digest import chosen
from torchord.cache.errors import InvalidInput, NoKey, NotAuthentic, RecordDamaged, TorchordError
from torchord.cache.keyring import NO_KEYS, AnyKeyring, Places, Role
from torchord.cache.ledger.incarnation import life
from torchord.cache.ledger.records import VersionRecord
from torchord.cache.reading import FOREIGN, number_of
from torchord.cache.servers.fast_client import Command, Lane, LaneClosed, script_command, script_text
from torchord.cache.servers.redis_client import translated

log = logging.getLogger(__name__)

_Record = TypeVar("_Record")
_ANY: tuple[Role, ...] = ("worker", "submit", "server")


class ControlPlane:
    """What every operation on a run's keys goes through.

    Args:
        client: a connection from `torchord.cache.servers.redis_client`.
        url: its URL, for messages.
        run: the run's name.
        lane: a shorter way to the same server; None: everything goes over `client`.
        keyring: seals what is written, and opens what is read.

    Attributes:
        digest: of the content of what is stored for the run, as its config has it.
    """

    def __init__(
        self,
        client: redis.Redis,
        url: str,
        run: str,
        *,
        lane: Lane | None = None,
        keyring: AnyKeyring = NO_KEYS,
    ) -> None:
        self.client = client
        self.url = url
        self.lane = lane
        self.keyring = keyring
        self.run = keys.check_name(run)
        self.keys = keys.RunKeys(run)
        self.places = Places(run)
        self.digest = chosen("auto", keyed=bool(keyring) and not keyring.local)
        self._incarnation = ""  # as it was last seen; asked only where there are keys

    def _sealed(self, role: Role, place: Callable[..., str], *where: object, text: str) -> str:
        """A record to write, bound to its place in the present life of the run.

        Args:
            place: of `self.places`; its last argument is the life.
            where: its other arguments but the run.
        """
        if not self.keyring:
            return text
        return self.keyring.sealed(role, place(*where, life(self._incarnation or self._look())), text)

    def _opened(self, role: Role, place: Callable[..., str], *where: object, text: str) -> str:
        """A record that was read, if it is one of this place in the present life; arguments as `_sealed`."""
        return self._opened_for(life, role, place, *where, text=text)

    def _sealed_by_any(self, place: Callable[..., str], *where: object, text: str) -> str:
        """`_sealed`, by the role that this process has; what anybody of the fleet may write."""
        role = next((role for role in _ANY if self.keyring.signs(role)), _ANY[0])
        return self._sealed(role, place, *where, text=text)

    def _opened_by_any(self, place: Callable[..., str], *where: object, text: str) -> str:
        """The inverse of `_sealed_by_any`, whichever role had sealed it."""
        for role in _ANY[1:]:
            with suppress(NotAuthentic):
                return self._opened(role, place, *where, text=text)
        return self._opened(_ANY[0], place, *where, text=text)

    def _opened_for(
        self,
        part: Callable[[str], str],
        role: Role,
        place: Callable[..., str],
        *where: object,
        text: str,
    ) -> str:
        """`_opened`, of the part of the incarnation (`life`, `revision`) that the seal is bound to."""
        if not self.keyring:
            return self.keyring.opened(role, "", text)
        seen = self._incarnation or self._look()
        try:
            return self.keyring.opened(role, place(*where, part(seen)), text)
        except NotAuthentic:
            if part(self._look()) == part(seen):
                raise
            return self.keyring.opened(role, place(*where, part(self._incarnation)), text)

    def _opened_version(self, version: int, text: str) -> str:
        return self._opened("server", self.places.version, version, text=text)

    def _version(self, version: int, text: str) -> VersionRecord:
        """The record of a version, as its hash has it."""
        record = VersionRecord.from_json(self._opened_version(version, text))
        if record.version != version:
            raise RecordDamaged(f"it says that it is version {record.version}")
        return record

    def _sealed_version(self, record: VersionRecord) -> str:
        """What `_version` reads."""
        return self._sealed("server", self.places.version, record.version, text=record.to_json())

    def _look(self) -> str:
        """Ask which incarnation is in force."""
        found = self.client.hget(self.keys.head, "incarnation")
        self._incarnation = cast(str | None, found) or ""
        return self._incarnation

    @contextmanager
    def _during(self, what: str, link: str = " of") -> Iterator[None]:
        """Translate what redis-py raises, and what reading a record raises that nobody of ours wrote."""
        doing = f"{what}{link} run {self.run!r}"
        try:
            with translated(self.url, doing):
                yield
        except (NotAuthentic, NoKey):
            raise
        except (RecordDamaged, InvalidInput) as error:
            raise self._damaged(doing, str(error)) from error
        except TorchordError:
            raise
        except FOREIGN as error:
            raise self._damaged(doing, f"{type(error).__name__}: {error!s:.200}") from error

    def _damaged(self, doing: str, why: str) -> RecordDamaged:
        return RecordDamaged(
            f"cannot {doing}: what is stored there is no record ({why}); look at what else writes to the "
            f"keys {self.keys.root}:* of this Redis"
        )

    def _sound(
        self,
        found: Any,
        read: Callable[[str], _Record],
        *names: str,
        number_in: Callable[[_Record], int] | None = None,
        opened: Callable[[int, str], str] | None = None,
        forged_stay: bool = False,
    ) -> dict[int, _Record]:
        """Read a hash of records by number.

        What is none is deleted and logged: nobody of ours wrote it, and what it stands for is computed anew.

        Args:
            names: keys from which it is deleted.
            number_in: the number that a record itself says it has.
            opened: takes the seal off a record; None: they have none.
            forged_stay: whether a record whose seal we do not believe is left out and not deleted.
        """
        sound: dict[int, _Record] = {}
        for number, text in sorted(pairs(found).items()):
            try:
                place = number_of(number, "its number")
                record = read(text if opened is None else opened(place, text))
                if number_in is not None and number_in(record) != place:
                    raise RecordDamaged(f"it says that it is number {number_in(record)}")
                sound[place] = record
            except (TorchordError, *FOREIGN) as error:
                stays = forged_stay and isinstance(error, NotAuthentic)
                said = "left out" if stays else "deleted"
                log.error("%s: field %.99r is no record: %s (%.300s)", names[0], number, said, error)
                for name in () if stays else names:
                    self.client.hdel(name, number)
        return sound

    def _call(self, *commands: Command) -> list[Any]:
        """Send commands that may be sent twice, and return their answers, in one round trip by the lane."""
        if self.lane is not None:
            with suppress(LaneClosed):
                return self.lane.call(*commands)
        return [self._ask(command) for command in commands]

    def _ask(self, command: Command) -> Any:
        try:
            return self.client.execute_command(*command)  # type: ignore[no-untyped-call]
        except redis.exceptions.NoScriptError:
            self.client.script_load(script_text(command))
            return self.client.execute_command(*command)  # type: ignore[no-untyped-call]

    def _script(self, name: str, names: Sequence[str], args: Sequence[Any]) -> Any:
        return self._call(script_command(name, names, args))[0]


def pairs(found: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """A hash: as redis-py gives it, or as the lane does, flat: field, value, field, value."""
    if isinstance(found, Mapping):
        return dict(found)
    return dict(zip(found[::2], found[1::2], strict=True))
