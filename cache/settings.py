"""The only module that reads the environment.

Order of precedence everywhere: explicit argument, then environment, then default.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from torchord.cache.errors import InvalidInput

DEFAULT_URL = "redis://localhost:6379/0"
DEFAULT_CHECKPOINT_DIR = "checkpoints"
DEFAULT_TELL_QUEUE = "celery"
OVERLAPS = frozenset({"upload", "collect", "fetch"})
"""upload: gradients leave a Client while its backward runs. collect: the training server reads them while
the step is computed. fetch: Clients read the next version while the training server stores it."""

FLOWER_ALLOWS = frozenset({"pause", "resume", "cancel", "download"})
"""What Flower's pages about runs may do beside showing them: buttons, and handing out a run's weights."""

REMOTE_CONTROL_ALL = "*"
"""Among the remote commands that a worker obeys: all of Celery's."""

HARDWARE = ("native", "portable")
"""Which kernels a process computes with: its machine's fastest, or those that machines share."""

PORTABLE_KERNELS = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": (
        "X86_V4 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR"
    ),
}
"""What a portable process has in its environment before torch and numpy are imported, which read it once."""

_MOST_DIGITS = 18
_ON, _OFF = frozenset({"", "on", "1", "yes", "true"}), frozenset({"off", "0", "no", "false"})


@dataclass(frozen=True, slots=True)
class Settings:
    """What the process was told through its environment. No `repr` shows its URLs, which may hold passwords.

    Attributes:
        url: Redis URL of broker, control plane and, by default, of the tensors.
        cache_urls: URLs of the tensor nodes, each of which may be a whole Redis Cluster
            (redis+cluster://HOST:PORT,HOST:PORT); empty means `url` alone.
        cache_replicas: further nodes that get a copy of each chunk of a tensor.
        cache_weights: relative share of each of `cache_urls`, in their order; empty means equal.
        cache_connections: sockets per node that one operation uses at a time.
        checkpoint_dir: directory or fsspec URL under which each run has a folder.
        runs_url: where the database of runs is: a URL of SQLAlchemy's, or "off"; "" for an SQLite file
            beside the checkpoints.
        allowed_modules: module prefixes that a worker may import recipes from, "." for what lies under
            the directory that the worker was started in; None means "." and "torch".
        host_cache: whether processes of one host share fetched versions.
        keep_memory: whether a worker keeps the memory that it frees for its next step.
        device: "auto" (CUDA if there is one, else CPU), "cpu", "cuda" or "cuda:N".
        hardware: one of `HARDWARE`; see docs/portable.md.
        server_memory_bytes: how much model and optimizer state a training server keeps warm.
        memory_limit_bytes: resident memory at which a worker ends after its task and starts anew; 0: none.
        dataset_memory_bytes: how much of stored datasets a process keeps in memory.
        dataset_disk: directory in which the processes of this host keep chunks of stored
            datasets; "" for none.
        dataset_disk_bytes: how much they keep there.
        dataset_urls: schemes and places at which stored datasets may lie outside of the cache; None means
            directories and object stores (`torchord.cache.datasets.allowed_urls`).
        task_log: whether Celery logs a line at the start and at the end of each task (at INFO); None: a line
            every ten seconds says what there was.
        overlap: which transfers between hosts may run while something is computed, of `OVERLAPS`.
        keys: file of the keys that records are sealed and opened with; "" for those of a local cluster, if it
            is one's; "off" for none.
        remote_control: Celery's remote commands that a worker obeys beyond those that only ask, by name;
            `REMOTE_CONTROL_ALL` among them for all; None for none at all, questions included.
        tell_tasks: tasks of other Celery apps that a run may have called when something happens, by name;
            a name that ends in "*" stands for all that begin so.
        tell_urls: schemes and places whose addresses a run may have called, as for `dataset_urls`.
        tell_key: with what such a call is signed; "" calls none.
        tell_queue: the queue that such tasks are sent to.
        faults: plan of injected faults, for tests (see torchord.coordinator.runtime.faults); "" for none.
    """

    url: str = field(default=DEFAULT_URL, repr=False)
    cache_urls: tuple[str, ...] = field(default=(), repr=False)
    cache_replicas: int = 0
    cache_weights: tuple[float, ...] = ()
    cache_connections: int = 1
    checkpoint_dir: str = DEFAULT_CHECKPOINT_DIR
    runs_url: str = field(default="", repr=False)
    allowed_modules: tuple[str, ...] | None = None
    host_cache: bool = True
    keep_memory: bool = True
    device: str = "auto"
    hardware: str = "native"
    server_memory_bytes: int = 4 << 30
    memory_limit_bytes: int = 0
    dataset_memory_bytes: int = 256 << 20
    dataset_disk: str = ""
    dataset_disk_bytes: int = 16 << 30
    dataset_urls: tuple[str, ...] | None = None
    task_log: bool | None = None
    overlap: frozenset[str] = OVERLAPS
    keys: str = ""
    remote_control: frozenset[str] | None = frozenset()
    tell_tasks: tuple[str, ...] = ()
    tell_urls: tuple[str, ...] = ()
    tell_key: str = field(default="", repr=False)
    tell_queue: str = DEFAULT_TELL_QUEUE
    faults: str = ""


def located(path: str | os.PathLike[str]) -> str:
    """Return a path as a shell means it: `~` is somebody's home, and a relative one lies where we are now.

    A URL stays as it is.
    """
    text = os.fspath(path)
    return text if "://" in text else str(Path(os.path.expanduser(text)).absolute())


def _words(value: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in value.split(",") if word.strip())


def _urls(value: str) -> tuple[str, ...]:
    """URLs between commas; a part without "://" belongs to the URL before it, which lists several hosts."""
    urls: list[str] = []
    for word in _words(value):
        if "://" in word or not urls:
            urls.append(word)
        else:
            urls[-1] += f",{word}"
    return tuple(urls)


def _whole(name: str, default: int, of: str = " of bytes") -> int:
    """A whole number, as a rule of bytes.

    Raises:
        InvalidInput: it is none.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit()):
        raise InvalidInput(f"{name} must be a whole number{of}, such as {default}, not {text!r:.60}")
    if len(text) > _MOST_DIGITS:
        raise InvalidInput(f"{name} must be a whole number{of} of at most {_MOST_DIGITS} digits")
    return int(text)


def _numbers(name: str) -> tuple[float, ...]:
    """Numbers between commas.

    Raises:
        InvalidInput: one is none.
    """
    text = os.environ.get(name, "")
    try:
        return tuple(float(word) for word in _words(text))
    except ValueError:
        raise InvalidInput(f"{name} must be numbers between commas, such as 1,1,2, not {text!r}") from None


def _on(name: str) -> bool:
    """Whether a variable is on, as it is when nobody set it.

    Raises:
        InvalidInput: it is neither on nor off.
    """
    word = os.environ.get(name, "").strip().lower()
    if word in _OFF:
        return False
    if word in _ON:
        return True
    raise InvalidInput(f"{name} must be on or off, not {word!r}")


def _overlap(name: str) -> frozenset[str]:
    """Some of `OVERLAPS`.

    Raises:
        InvalidInput: a word is none of them.
    """
    words = frozenset(_words(os.environ.get(name, "").lower()))
    if unknown := words - OVERLAPS - _ON - _OFF:
        among = ", ".join(sorted(OVERLAPS))
        raise InvalidInput(f"{name} must be on, off, or some of {among} between commas, not {min(unknown)!r}")
    if not words or words & _ON:
        return OVERLAPS
    return words & OVERLAPS


def flower_allows(argument: str | None = None) -> frozenset[str]:
    """What Flower's pages about runs may do, of `FLOWER_ALLOWS`; nothing unless somebody says so.

    Args:
        argument: words between commas, "on" or "off"; None: those of TORCHORD_FLOWER_ALLOWS.

    Raises:
        InvalidInput: a word is none of them.
    """
    given = os.environ.get("TORCHORD_FLOWER_ALLOWS", "") if argument is None else argument
    words = frozenset(_words(given.lower()))
    if unknown := words - FLOWER_ALLOWS - _ON - _OFF:
        name = "TORCHORD_FLOWER_ALLOWS" if argument is None else "--runs-allow"
        among = ", ".join(sorted(FLOWER_ALLOWS))
        raise InvalidInput(f"{name} must be on, off, or some of {among} between commas, not {min(unknown)!r}")
    return FLOWER_ALLOWS if words & _ON else words & FLOWER_ALLOWS


def api_tokens() -> str:
    """The entries of tokens that the REST interface admits (TORCHORD_API_TOKENS, or its file); "" for none.

    Raises:
        InvalidInput: the file cannot be read.
    """
    return _given("TORCHORD_API_TOKENS")


def api_recipes() -> str:
    """The directory of the recipes that may be submitted by name (TORCHORD_API_RECIPES); "" for none."""
    return located(folder) if (folder := os.environ.get("TORCHORD_API_RECIPES")) else ""


def _keys(text: str) -> str:
    return "off" if text.lower() in _OFF else located(text) if text else ""


def _remote_control(name: str) -> frozenset[str] | None:
    """Names of remote commands between commas; on: all of them, off: not even questions; unset: questions."""
    words = frozenset(_words(os.environ.get(name, "").lower()))
    if words & _OFF:
        return None
    return frozenset({REMOTE_CONTROL_ALL}) if words & _ON else words


def _given(name: str) -> str:
    """A variable that may hold a password, or what stands in the file that NAME_FILE names.

    Raises:
        InvalidInput: there is no such file, or nothing in it.
    """
    if value := os.environ.get(name):
        return value
    if not (path := os.environ.get(f"{name}_FILE")):
        return ""
    try:
        value = Path(located(path)).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise InvalidInput(f"{name}_FILE names {path!r}, which cannot be read: {why}") from None
    if not value:
        raise InvalidInput(f"{name}_FILE names {path!r}, in which nothing stands; write it there")
    return value


def portable() -> bool:
    """Whether this process was told to compute with the kernels that machines share."""
    return os.environ.get("TORCHORD_HARDWARE", "").strip().lower() == "portable"


def pin_kernels() -> None:
    """Have the libraries of a portable process choose the kernels that machines share, if it is one.

    To be called before torch or numpy is imported.
    """
    if portable():
        os.environ.update(PORTABLE_KERNELS)


def _hardware(device: str) -> str:
    """TORCHORD_HARDWARE.

    Raises:
        InvalidInput: it is none of `HARDWARE`, or contradicts the device.
    """
    word = os.environ.get("TORCHORD_HARDWARE", "").strip().lower() or HARDWARE[0]
    if word not in HARDWARE:
        raise InvalidInput(f"TORCHORD_HARDWARE must be {' or '.join(HARDWARE)}, not {word!r:.60}")
    if word == "portable" and device.startswith("cuda"):
        raise InvalidInput(
            f"TORCHORD_HARDWARE=portable is for computing on the CPU, and TORCHORD_DEVICE is {device!r}; "
            "leave one of them out"
        )
    return word


def cublas_workspace() -> str:
    """The workspaces that cuBLAS is told to use, "" if it may choose: then its results can vary."""
    return os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")


def from_environment() -> Settings:
    """Read TORCHORD_* once and return it as a value.

    `CELERY_BROKER_URL` comes before `TORCHORD_URL` because `celery -b URL` sets it: an
    argument that a person typed, and the one that Celery itself obeys.

    Raises:
        InvalidInput: a variable cannot be used; the message names it and what it may be.
    """
    env = os.environ
    allowed = env.get("TORCHORD_ALLOWED_MODULES")
    device = env.get("TORCHORD_DEVICE") or "auto"
    return Settings(
        url=env.get("CELERY_BROKER_URL") or _given("TORCHORD_URL") or DEFAULT_URL,
        cache_urls=_urls(_given("TORCHORD_CACHE_URLS")),
        cache_replicas=_whole("TORCHORD_CACHE_REPLICAS", 0, of=""),
        cache_weights=_numbers("TORCHORD_CACHE_WEIGHTS"),
        cache_connections=_whole("TORCHORD_CACHE_CONNECTIONS", 1, of=""),
        checkpoint_dir=located(env.get("TORCHORD_CHECKPOINT_DIR") or DEFAULT_CHECKPOINT_DIR),
        runs_url=_given("TORCHORD_RUNS_URL"),
        allowed_modules=None if allowed is None else _words(allowed),
        host_cache=_on("TORCHORD_HOST_CACHE"),
        keep_memory=_on("TORCHORD_KEEP_MEMORY"),
        device=device,
        hardware=_hardware(device),
        server_memory_bytes=_whole("TORCHORD_SERVER_MEMORY_BYTES", 4 << 30),
        memory_limit_bytes=_whole("TORCHORD_MEMORY_LIMIT_BYTES", 0),
        dataset_memory_bytes=_whole("TORCHORD_DATASET_MEMORY_BYTES", 256 << 20),
        dataset_disk=located(disk) if (disk := env.get("TORCHORD_DATASET_DISK")) else "",
        dataset_disk_bytes=_whole("TORCHORD_DATASET_DISK_BYTES", 16 << 30),
        dataset_urls=None if (urls := env.get("TORCHORD_DATASET_URLS")) is None else _words(urls),
        task_log=_on("TORCHORD_TASK_LOG") if env.get("TORCHORD_TASK_LOG", "").strip() else None,
        overlap=_overlap("TORCHORD_OVERLAP"),
        keys=_keys(env.get("TORCHORD_KEYS", "").strip()),
        remote_control=_remote_control("TORCHORD_REMOTE_CONTROL"),
        tell_tasks=_words(env.get("TORCHORD_TELL_TASKS", "")),
        tell_urls=_words(env.get("TORCHORD_TELL_URLS", "")),
        tell_key=_given("TORCHORD_TELL_KEY"),
        tell_queue=env.get("TORCHORD_TELL_QUEUE", "").strip() or DEFAULT_TELL_QUEUE,
        faults=env.get("TORCHORD_FAULTS", ""),
    )
