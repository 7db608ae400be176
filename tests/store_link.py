"""A link between clients and a local server: its speed, its cuts, and what was asked over it."""

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_REQUEST = re.compile(rb"(GET|HEAD|PUT|POST|DELETE) (/\S*) HTTP/1\.1")
_BLOCK_BYTES = 1 << 16


class Link:
    """Passes connections on to a port of this machine.

    rate      bytes per second of all answers together; None: as fast as it goes
    latency   seconds that each answer takes to begin
    flows     while it is cleared, no answer passes
    is_cut    connections end, and new ones are closed at once
    requests  method and path of each request
    sent      bytes of all answers
    """

    def __init__(self, port: int) -> None:
        self.rate: float | None = None
        self.latency = 0.0
        self.flows = threading.Event()
        self.flows.set()
        self.requests: list[tuple[str, str]] = []
        self.sent = 0
        self._target = port
        self._cut = threading.Event()
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._ends: set[socket.socket] = set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End all connections and take no others."""
        self._cut.set()
        with self._lock:
            ends = list(self._ends)
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Take connections again."""
        self._cut.clear()

    def close(self) -> None:
        self._server.close()
        self.cut()

    def asked(self, method: str, path: str) -> int:
        """The number of requests for paths that end so."""
        return sum(m == method and p.partition("?")[0].endswith(path) for m, p in self.requests)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            if self._cut.is_set():
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self._target))
            with self._lock:
                self._ends |= {near, far}
            asked = threading.Event()
            for ends in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._pass_on, args=(*ends, asked), daemon=True).start()

    def _pass_on(
        self,
        source: socket.socket,
        target: socket.socket,
        is_answer: bool,
        asked: threading.Event,
    ) -> None:
        with suppress(OSError):
            while data := source.recv(_BLOCK_BYTES):
                if is_answer:
                    if asked.is_set():
                        asked.clear()
                        time.sleep(self.latency)
                    self._wait_for(len(data))
                    self.flows.wait()
                else:
                    asked.set()
                    self.requests += [
                        (method.decode(), path.decode()) for method, path in _REQUEST.findall(data)
                    ]
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            with self._lock:
                self._ends.discard(end)

    def _wait_for(self, count: int) -> None:
        with self._lock:
            self.sent += count
            if self.rate is None:
                return
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + count / self.rate
            pause = self._free_at - now
        time.sleep(pause)


@contextmanager
def link_to(port: int) -> Iterator[Link]:
    """Give a link to a port of this machine, closed at the end."""
    link = Link(port)
    try:
        yield link
    finally:
        link.close()
