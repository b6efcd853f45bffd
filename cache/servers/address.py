"""Where a server is: every form of URL that torchord takes, read, masked and spelled for Celery.

    redis://[USER:PASSWORD@]HOST[:PORT][/DB]                    one server; valkey:// is the same
    rediss://...                                                the same over TLS; valkeys:// is the same
    unix://[USER:PASSWORD@]/PATH[?db=DB]                        a unix socket; redis+socket:// is the same
    sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST...]/SERVICE[/DB]
    redis+cluster://[USER:PASSWORD@]HOST[:PORT][,HOST...]       a Redis Cluster; rediss+cluster:// over TLS

Sentinels watch a primary and its replicas, and elect another primary when it dies: who that is, is asked
at each new connection. Options follow behind "?", and a name of the server's own behind "#". The database
may also be an option, `db` or `virtual_host`; further ones say how to check certificates (ssl_...) and how
long to wait (`TIMEOUTS`). Every reader of a URL (control plane, Celery's broker and results, cache nodes)
goes by what is read here; an option that nobody reads is refused. In a user, password or path, characters
that mean something in a URL are written as %XX.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qs, quote, unquote, urlencode, urlsplit

from torchord.cache.errors import InvalidInput

DEFAULT_PORT = 6379
_SENTINEL_PORT = 26379
_SAME = {"valkey": "redis", "valkeys": "rediss", "redis+socket": "unix"}
_CLUSTERS = {
    "redis+cluster": "redis",
    "rediss+cluster": "rediss",
    "valkey+cluster": "redis",
    "valkeys+cluster": "rediss",
}
TIMEOUTS = ("socket_timeout", "socket_connect_timeout", "health_check_interval")
"""Options in seconds: of each reply, of a connection, between two questions whether it still lives."""

_TLS = ("ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname")
_OPTIONS = ("db", "virtual_host", "username", "password", *_TLS, *TIMEOUTS, "socket_keepalive")
_SENTINEL_LOOKS = "a Sentinel URL looks like sentinel://HOST:26379,HOST:26379/SERVICE/DB"
_CLUSTER_LOOKS = (
    "a Redis Cluster URL looks like redis+cluster://HOST:PORT,HOST:PORT (or rediss+cluster:// for TLS)"
)
_SECRET_OPTION = re.compile(r"([?&]\w*(?:pas|pw|secret|token)\w*=)[^&#;]*", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z+]*:?//?|")  # one that lacks a sign, too
_NO_PORT = re.compile(r":(?!\d+(?:,|$))[^,]+")  # a password, it may be, whose host was forgotten
_NEXT_URL = re.compile(r";(?=[a-z+]+://)")  # Celery's spelling of several sentinels


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is and how to be let in.

    Attributes:
        label: the URL without credentials and options; safe to log, identifies the node.
        host: host name or address; empty for a unix socket.
        port: TCP port; 0 for a unix socket.
        path: file name of the unix socket, else empty.
        db: logical database.
        username: ACL user, or None for the default user.
        password: or None where the server asks for none.
        tls: how to verify the server (and present a client certificate), or None without TLS.
        sentinels: whom to ask at each new connection where the primary of `service` is; then host and
            port are empty, and user and password are the primary's.
        service: name under which the sentinels watch the primary.
        timeouts: those of `TIMEOUTS` that the URL gives, in seconds.
        tls_options: what the URL says about TLS, as it stands there.
    """

    label: str
    host: str
    port: int
    path: str
    db: int
    username: str | None = field(repr=False)
    password: str | None = field(repr=False)
    tls: ssl.SSLContext | None = field(repr=False, compare=False)
    sentinels: tuple[tuple[str, int], ...] = ()
    service: str = ""
    timeouts: tuple[tuple[str, float], ...] = field(default=(), compare=False)
    tls_options: tuple[tuple[str, str], ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read the URL of one server, or of sentinels.

        The query may hold the options of the module's docstring, spelled as redis-py and Celery spell them.
        A fragment names the node: "redis://10.0.0.5/0#left".

        Raises:
            InvalidInput: the URL cannot be used; the message does not repeat its password.
        """
        try:
            parts = _split(url)
            return _sentinels(parts) if parts.scheme == "sentinel" else _server(parts)
        except (ValueError, OSError) as error:
            raise InvalidInput(f"the URL {masked(url)} cannot be used: {error}") from error

    def url(self, *, celery: bool = False) -> str:
        """The URL of one server in its plainest form, with its credentials.

        Args:
            celery: as Celery and kombu take it, which want a unix socket as `redis+socket://` with its
                database as `virtual_host`; else as redis-py does. Timeouts are not in it.
        """
        user = "" if self.password is None and self.username is None else quote(self.username or "", safe="")
        if self.password is not None:
            user += f":{quote(self.password, safe='')}"
        place = f"{user}@" if user else ""
        if self.path:
            if celery:
                return f"redis+socket://{place}{self.path}?virtual_host={self.db}"
            return f"unix://{place}{self.path}?db={self.db}"
        options = dict(self.tls_options)
        if self.tls is not None and celery:  # which refuses a URL that does not say so
            options.setdefault("ssl_cert_reqs", "required")
        query = f"?{urlencode(options)}" if options else ""
        scheme = "redis" if self.tls is None else "rediss"
        return f"{scheme}://{place}{bracketed(self.host)}:{self.port}/{self.db}{query}"


@dataclass(frozen=True, slots=True)
class ClusterAddress:
    """Where a Redis Cluster is.

    Attributes:
        label: the URL without credentials, its servers sorted, or its #fragment.
        servers: some of the cluster's servers; one that answers is enough to find all.
    """

    label: str
    servers: tuple[Address, ...]

    @classmethod
    def parse(cls, url: str) -> ClusterAddress:
        """Read the URL of a Redis Cluster.

        User, password and options (those of `Address.parse`) are the same for all servers.

        Raises:
            InvalidInput: the URL cannot be used; the message does not repeat its password.
        """
        try:
            parts = _split(url)
            plain = _CLUSTERS.get(parts.scheme)
            credentials, at, hosts = parts.netloc.rpartition("@")
            rest = f"{parts.path}?{parts.query}"
            named = [
                urlsplit(f"{plain}://{credentials}{at}{host}{rest}") for host in hosts.split(",") if host
            ]
            if plain is None or not named:
                raise ValueError(_CLUSTER_LOOKS)
            servers = tuple(map(_server, named))
            if any(server.db for server in servers):
                raise ValueError("it names a database; a cluster has only 0")
        except (ValueError, OSError) as error:
            raise InvalidInput(f"the URL {masked(url)} cannot be used: {error}") from error
        where = sorted(f"{bracketed(server.host)}:{server.port}" for server in servers)
        return cls(parts.fragment or f"{parts.scheme}://{','.join(where)}", servers)


def is_sentinel(url: str) -> bool:
    """Whether a URL names sentinels."""
    return url.startswith("sentinel://")


def is_cluster(url: str) -> bool:
    """Whether a URL names a Redis Cluster."""
    return url.partition("://")[0] in _CLUSTERS


def masked(url: str) -> str:
    """The URL without its passwords, fit for a message or a log, whatever its form and however malformed.

    Example:
        >>> masked("sentinel://ada:word@a:26379,b:26379/primary")
        'sentinel://ada:***@a:26379,b:26379/primary'
    """
    return ";".join(_masked(one) for one in _NEXT_URL.split(url))


def celery_url(url: str) -> str:
    """The same place in the form that both Celery and kombu accept.

    Sentinels are one URL each there, joined by semicolons; else see `Address.url`.

    Args:
        url: of one server as redis-py reads it, or of sentinels.

    Raises:
        InvalidInput: the URL cannot be used; the message does not repeat its password.
    """
    found = Address.parse(url)
    if not found.sentinels:
        return found.url(celery=True)
    user = "" if found.password is None else f"{quote(found.username or '')}:{quote(found.password)}@"
    return ";".join(f"sentinel://{user}{host}:{port}/{found.db}" for host, port in found.sentinels)


def bracketed(host: str) -> str:
    """A host as it stands before a port: the address of IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def _server(parts: SplitResult) -> Address:
    """One server, by TCP, TLS or a unix socket.

    Raises:
        ValueError: the URL cannot be read.
        OSError: a file that it names for TLS cannot be read.
    """
    options = _options(parts)
    scheme = _SAME.get(parts.scheme, parts.scheme)
    unix = scheme == "unix"
    if scheme not in ("redis", "rediss", "unix") or (unix and not parts.path):
        raise ValueError("it must begin with redis://, rediss://, unix:/// or redis+cluster://")
    host = "" if unix else parts.hostname or "localhost"
    port = 0 if unix else _port(parts)
    db = _database("" if unix else parts.path.strip("/"), options)
    tls_options = tuple((name, options[name]) for name in _TLS if name in options)
    if tls_options and scheme != "rediss":
        raise ValueError(f"{tls_options[0][0]} is about TLS, for which it must begin with rediss://")
    tls = _tls_context(options) if scheme == "rediss" else None
    where = parts.path if unix else f"{bracketed(host)}:{port}"
    label = unquote(parts.fragment) or f"{scheme}://{where}{'?db=' if unix else '/'}{db}"
    username = unquote(parts.username) if parts.username else options.get("username")
    password = unquote(parts.password) if parts.password else options.get("password")
    return Address(
        label=label,
        host=host,
        port=port,
        path=parts.path if unix else "",
        db=db,
        username=username,
        password=password,
        tls=tls,
        timeouts=_timeouts(options),
        tls_options=tls_options,
    )


def _split(url: str) -> SplitResult:
    """The parts of a URL.

    Raises:
        ValueError: what stands before its last @ is no user and password; the message repeats none of it.
    """
    parts = urlsplit(url)
    behind = (
        parts.fragment if _SAME.get(parts.scheme, parts.scheme) == "unix" else parts.path + parts.fragment
    )
    host = parts.netloc.rpartition("]")[2]
    if ":" in host and not host.rpartition(":")[2].isdigit():  # a password's beginning, as it seems
        behind += parts.query
    if "@" in behind and "@" not in parts.netloc:
        raise ValueError("its user or password holds one of / ? #; write them as %2F %3F %23")
    return parts


def _port(parts: SplitResult) -> int:
    try:
        return parts.port or DEFAULT_PORT
    except ValueError:
        raise ValueError("what stands behind its host is no port, a number up to 65535") from None


def _options(parts: SplitResult) -> dict[str, str]:
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise ValueError(f"nobody reads its option {unknown[0]!r}; known are {', '.join(sorted(_OPTIONS))}")
    return options


def _database(path: str, options: dict[str, str]) -> int:
    given = [text for text in (path, options.get("db"), options.get("virtual_host")) if text]
    for text in given:
        if not text.strip("/").isdigit():
            raise ValueError("what should be the number of its database is none")
    found = {int(text.strip("/")) for text in given}
    if len(found) > 1:
        raise ValueError(f"it names several databases: {', '.join(map(str, sorted(found)))}")
    return found.pop() if found else 0


def _timeouts(options: dict[str, str]) -> tuple[tuple[str, float], ...]:
    found = []
    for name in TIMEOUTS:
        if name in options:
            try:
                seconds = float(options[name])
            except ValueError:
                seconds = -1.0
            if not 0 < seconds < float("inf"):
                raise ValueError(f"{name} must be a number of seconds greater than 0, not {options[name]!r}")
            found.append((name, seconds))
    return tuple(found)


def _sentinels(parts: SplitResult) -> Address:
    """The primary that sentinels name.

    Raises:
        ValueError: the URL cannot be read; the message says how one looks.
    """
    options = _options(parts)
    credentials, _, hosts = parts.netloc.rpartition("@")
    service, _, db = parts.path.strip("/").partition("/")
    named = [host for host in hosts.split(",") if host]
    if not named or not service or (db and not db.isdigit()):
        raise ValueError(_SENTINEL_LOOKS)
    sentinels = []
    for one in named:
        host, colon, port = one.rpartition(":")
        sentinels.append((host, int(port)) if colon else (one, _SENTINEL_PORT))
    user, colon, password = credentials.partition(":")
    where = ",".join(f"{host}:{port}" for host, port in sentinels)
    return Address(
        label=f"sentinel://{where}/{service}/{int(db or 0)}",
        host="",
        port=0,
        path="",
        db=int(db or 0),
        username=unquote(user) or None,
        password=unquote(password) if colon else None,
        tls=None,
        sentinels=tuple(sentinels),
        service=service,
        timeouts=_timeouts(options),
    )


def _tls_context(options: dict[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
    requirement = options.get("ssl_cert_reqs", "required").lower().removeprefix("cert_")
    if requirement not in ("required", "optional", "none"):
        raise ValueError(f"ssl_cert_reqs={requirement!r} is not one of required, optional, none")
    unchecked = options.get("ssl_check_hostname", "true").lower() in ("false", "0", "no")
    context.check_hostname = requirement == "required" and not unchecked
    context.verify_mode = {
        "required": ssl.CERT_REQUIRED,
        "optional": ssl.CERT_OPTIONAL,
        "none": ssl.CERT_NONE,
    }[requirement]
    if "ssl_certfile" in options:
        context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"))
    return context


def _masked(url: str) -> str:
    found = _SCHEME.match(url)
    assert found is not None
    scheme, rest = found[0], url[found.end() :]
    credentials, at, where = rest.rpartition("@")  # the last one: a password may hold others
    user, colon, _ = credentials.partition(":")
    if colon:
        url = f"{scheme}{user}:***{at}{where}"
    elif not at and "[" not in rest:
        hosts = re.split("[/?#]", rest, maxsplit=1)[0]
        url = f"{scheme}{_NO_PORT.sub(':***', hosts)}{rest[len(hosts) :]}"
    return _SECRET_OPTION.sub(r"\1***", url)
