"""Network links of given speed on one machine: TCP proxies that let so many bytes through a second.

    python -m benchmarks.links --target 127.0.0.1:6379 --hosts 3

Each *host* has a port of its own; what its connections send, all together, passes at the link's rate, and
likewise what they receive (full duplex). A piece arrives when the link has transmitted it, and the
latency later. Bytes go by `splice` from socket to socket without coming into this process. Prints the
ports; takes lines "RATE LATENCY" (bytes a second, seconds one way) on its standard input, and
ends with it. Where there is no `splice` (not Linux) it copies.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

PIECE_NBYTES = 64 << 10
BUFFER_NBYTES = 256 << 10
"""What a link holds back of a connection, as a switch or a network card does."""

CREDIT_SECONDS = 0.002  # what a thread may be late by; longer than the latencies that are modelled


class Way:
    """One direction of a host's link, shared by its connections."""

    def __init__(self) -> None:
        self.rate = float("inf")  # bytes a second
        self.latency = 0.0  # seconds
        self._free_at = 0.0
        self._lock = threading.Lock()

    def transmit(self, nbytes: int, waited: bool) -> float:
        """Take a place on the link; when the piece arrives at the other end, by `time.monotonic`.

        Args:
            waited: whether the piece lay there before it was looked for: then the link would have begun
                with it while this thread still slept.
        """
        now = time.monotonic()
        with self._lock:
            start = max(self._free_at, now - CREDIT_SECONDS if waited else now)
            self._free_at = start + nbytes / self.rate
            return self._free_at + self.latency


def carry(source: socket.socket, target: socket.socket, way: Way) -> None:
    """Pass on what comes, until it ends."""
    outlet, inlet = os.pipe()
    try:
        while True:
            waited = bool(select.select([source], [], [], 0)[0])
            count = os.splice(source.fileno(), inlet, PIECE_NBYTES)
            if not count:
                break
            pause = way.transmit(count, waited) - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            while count:
                count -= os.splice(outlet, target.fileno(), count)
    except OSError:
        pass
    finally:
        os.close(inlet)
        os.close(outlet)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Link:
    """A host's link: listens on a port, and passes on to the target."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.up, self.down = Way(), Way()
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def set(self, rate: float, latency: float) -> None:
        """Set bytes a second and seconds one way, in both directions."""
        for way in (self.up, self.down):
            way.rate, way.latency = rate, latency

    def _listen(self) -> None:
        while True:
            here, _ = self._listener.accept()
            try:
                there = socket.create_connection(self._target, timeout=5)
            except OSError:
                here.close()
                continue
            there.settimeout(None)
            for end in (here, there):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_NBYTES)
            for source, target, way in ((here, there, self.up), (there, here, self.down)):
                threading.Thread(target=carry, args=(source, target, way), daemon=True).start()


class Links:
    """The links of one cluster, in a process of their own.

    Attributes:
        ports: one for each host.
        pid: of the process.
    """

    def __init__(self, process: subprocess.Popen[str], ports: Sequence[int]) -> None:
        self._process = process
        self.ports = list(ports)
        self.pid = process.pid

    def set(self, rate: float, latency: float) -> None:
        """Set bytes a second and seconds one way of every link, each direction."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{rate} {latency}\n")
        self._process.stdin.flush()


@contextmanager
def links(target_port: int, hosts: int) -> Iterator[Links]:
    """Start links to a port of this machine, without a limit at first."""
    argv = [sys.executable, "-m", "benchmarks.links", "--target", f"127.0.0.1:{target_port}", "--hosts"]
    process = subprocess.Popen(
        [*argv, str(hosts)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="ascii"
    )
    try:
        assert process.stdout is not None
        yield Links(process, [int(port) for port in process.stdout.readline().split()])
    finally:
        process.kill()
        process.wait()
        for end in (process.stdin, process.stdout):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.close()


def main() -> int:
    """Serve until the standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True, metavar="HOST:PORT")
    parser.add_argument("--hosts", type=int, default=1)
    options = parser.parse_args()
    host, _, port = options.target.rpartition(":")
    made = [Link((host, int(port))) for _ in range(options.hosts)]
    print(*(link.port for link in made), flush=True)
    for line in sys.stdin:
        rate, latency = map(float, line.split())
        for link in made:
            link.set(rate, latency)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
