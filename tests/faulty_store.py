"""A local S3 server that refuses requests, or drops connections in their middle, on demand."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

DENIED = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"""


@dataclass
class Faults:
    """What happens to requests: the first rule that fits, as often as it says.

    A rule is a pattern of METHOD PATH?QUERY, "refuse" or "drop", and how many are left.
    """

    rules: list[list[Any]] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)  # what they met
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, pattern: str, what: str, times: float = float("inf")) -> None:
        """Let something happen to requests that fit, from now on."""
        self.rules.append([re.compile(pattern), what, times])

    def clear(self) -> None:
        """Let all be well again."""
        self.rules.clear()

    def of(self, request: str) -> str | None:
        """Return what happens to a request now."""
        with self.lock:
            for rule in self.rules:
                if rule[2] > 0 and rule[0].search(request):
                    rule[2] -= 1
                    self.seen.append(request)
                    return rule[1]
        return None


@contextmanager
def faulty_server() -> Iterator[tuple[str, Faults]]:
    """Run a server of the same buckets as all of this process; its address, and its faults."""
    faults = Faults()
    plain = DomainDispatcherApplication(create_backend_app)

    def application(environ: dict[str, Any], start: Any) -> Any:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        match faults.of(request):
            case "refuse":
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start("403 Forbidden", [("Content-Type", "application/xml")])
                return [DENIED]
            case "drop":
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                raise ConnectionResetError
        return plain(environ, start)

    server = make_server("127.0.0.1", 0, application, True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", faults
    finally:
        server.shutdown()
        thread.join()
