"""Where a server is: every form of URL that torchord takes, read, masked and spelled for Celery.

    redis://[USER:PASSWORD@]HOST[:PORT][/DB]                    one server; valkey:// is the same
    rediss://...                                                the same over TLS; valkeys:// is the same
    unix://[USER:PASSWORD@]/PATH[?db=DB]                        a unix socket; redis+socket:// is the same
    sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST...]/SERVICE[/DB]
    redis+cluster://[USER:PASSWORD@]HOST[:PORT][,HOST...]       a Redis Cluster; rediss+cluster:// over TLS

Sentinels watch a primary and its replicas, and elect another primary when it dies: who that is, is asked
at each new connection. Options follow behind "?", and a name of the server's own behind "#".
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qs, parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

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
_SENTINEL_LOOKS = "a Sentinel URL looks like sentinel://HOST:26379,HOST:26379/SERVICE/DB"
_CLUSTER_LOOKS = (
    "a Redis Cluster URL looks like redis+cluster://HOST:PORT,HOST:PORT (or rediss+cluster:// for TLS)"
)
_SECRET_OPTION = re.compile(r"([?&]\w*password=)[^&#;]*")
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

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read the URL of one server, or of sentinels.

        The query may hold db, ssl_cert_reqs ("required" unless given), ssl_ca_certs, ssl_certfile,
        ssl_keyfile and ssl_check_hostname, spelled as Celery spells them; other options are
        ignored. A fragment names the node: "redis://10.0.0.5/0#left".

        Raises:
            InvalidInput: the URL cannot be used; the message does not repeat its password.
        """
        try:
            parts = urlsplit(url)
            return _sentinels(parts) if parts.scheme == "sentinel" else _server(parts)
        except (ValueError, OSError) as error:
            raise InvalidInput(f"the URL {masked(url)} cannot be used: {error}") from error


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
            parts = urlsplit(url)
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

    Celery wants a unix socket as `redis+socket://` with its database as `virtual_host`, one URL a sentinel,
    joined by semicolons, and refuses a `rediss://` URL that does not say whether certificates are checked;
    here they are, unless it says otherwise.

    Args:
        url: of one server as redis-py reads it, or of sentinels.

    Raises:
        InvalidInput: the URL cannot be used; the message does not repeat its password.
    """
    parts = urlsplit(url)
    if parts.scheme == "sentinel":
        found = Address.parse(url)
        user = "" if found.password is None else f"{quote(found.username or '')}:{quote(found.password)}@"
        return ";".join(f"sentinel://{user}{host}:{port}/{found.db}" for host, port in found.sentinels)
    options = dict(parse_qsl(parts.query))
    if parts.scheme == "unix":
        options["virtual_host"] = options.pop("db", "0")
        return f"redis+socket://{parts.netloc}{parts.path}?{urlencode(options)}"
    database = parts.path.strip("/")
    if database and not database.isdigit():
        raise InvalidInput(f"{database!r} is not the number of a database")
    if parts.scheme == "rediss" and "ssl_cert_reqs" not in options:
        options["ssl_cert_reqs"] = "required"
        return urlunsplit(parts._replace(query=urlencode(options)))
    return url


def bracketed(host: str) -> str:
    """A host as it stands before a port: the address of IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def _server(parts: SplitResult) -> Address:
    """One server, by TCP, TLS or a unix socket.

    Raises:
        ValueError: the URL cannot be read.
        OSError: a file that it names for TLS cannot be read.
    """
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    scheme = _SAME.get(parts.scheme, parts.scheme)
    unix = scheme == "unix"
    if scheme not in ("redis", "rediss", "unix") or (unix and not parts.path):
        raise ValueError("it must begin with redis://, rediss://, unix:/// or redis+cluster://")
    host = "" if unix else parts.hostname or "localhost"
    port = 0 if unix else parts.port or DEFAULT_PORT
    db = int(options.get("db") or options.get("virtual_host") or (not unix and parts.path.strip("/")) or 0)
    tls = _tls_context(options) if scheme == "rediss" else None
    where = parts.path if unix else f"{bracketed(host)}:{port}"
    label = unquote(parts.fragment) or f"{scheme}://{where}{'?db=' if unix else '/'}{db}"
    username = unquote(parts.username) if parts.username else options.get("username")
    password = unquote(parts.password) if parts.password else options.get("password")
    return Address(label, host, port, parts.path if unix else "", db, username, password, tls)


def _sentinels(parts: SplitResult) -> Address:
    """The primary that sentinels name.

    Raises:
        ValueError: the URL cannot be read; the message says how one looks.
    """
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
    scheme, slashes, rest = url.partition("://")
    credentials, at, where = rest.rpartition("@")  # the last one: a password may hold others
    user, colon, _ = credentials.partition(":")
    if colon:
        url = f"{scheme}{slashes}{user}:***{at}{where}"
    return _SECRET_OPTION.sub(r"\1***", url)
