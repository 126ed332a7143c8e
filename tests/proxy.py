"""What can go wrong between a client and a server: a TCP proxy that meddles, and a front that answers as it is told."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

_LIMIT = 60.0  # seconds that nothing takes, however busy the machine is


class Mood(Enum):
    """What a proxy does with a request, as soon as that begins."""

    HELP = auto()
    """Pass it on, and its answer back."""
    SWALLOW = auto()
    """Take it and do nothing; the connection stays."""
    CUT_BEFORE = auto()
    """Break the connection off, so that the server gets nothing."""
    CUT_AFTER = auto()
    """Pass it on, and break the connection off instead of passing on the answer."""


class Proxy:
    """Stands before a server on loopback.

    Args:
        port: the server's.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.requests = 0
        """How many HTTP requests have come."""
        self.connections = 0
        """How many connections have been made."""
        self.delay = 0.0
        """Seconds for which it keeps each answer."""
        self.meddle: Callable[[bytes], Mood] = lambda _: Mood.HELP
        """Decides about each request, given its first bytes."""
        self._sockets: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    @classmethod
    @contextmanager
    def started(cls, port: int) -> Iterator[Self]:
        """Begin, and end with every connection closed."""
        proxy = cls(port)
        proxy._threads[0].start()
        try:
            yield proxy
        finally:
            proxy.stop()

    def once(self, mood: Mood, containing: bytes = b"") -> None:
        """Treat the next request that contains this in one way, and all others well."""
        left = [mood]

        def meddle(request: bytes) -> Mood:
            return left.pop() if left and containing in request else Mood.HELP

        self.meddle = meddle

    def cut(self) -> None:
        """Break off the connections that there are."""
        for one in list(self._sockets):
            _cut(one)

    def stop(self) -> None:
        """Refuse connections from now on, and break off those that there are."""
        # a thread that waits in accept() is not woken by close()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(_LIMIT)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            server = socket.create_connection(("127.0.0.1", self._target))
            self._sockets |= {client, server}
            state = _State()
            for work in (self._up, self._down):
                thread = threading.Thread(target=work, args=(client, server, state), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _up(self, client: socket.socket, server: socket.socket, state: _State) -> None:
        """Carry what the client sends."""
        request = b""
        while data := _receive(client):
            # the headers come alone or with the body, and the decision wants both
            if not request and not data.startswith(b"POST "):
                break
            request += data
            if not _is_whole(request):
                continue
            self.requests += 1
            state.mood = self.meddle(request)
            if state.mood is Mood.CUT_BEFORE:
                break
            if state.mood is not Mood.SWALLOW:
                with suppress(OSError):
                    server.sendall(request)
            request = b""
        _cut(client)
        _cut(server)

    def _down(self, client: socket.socket, server: socket.socket, state: _State) -> None:
        """Carry what the server answers."""
        while data := _receive(server):
            time.sleep(self.delay)
            if state.mood is Mood.CUT_AFTER:
                break
            with suppress(OSError):
                client.sendall(data)
        _cut(client)
        _cut(server)


class _State:
    mood = Mood.HELP


def _receive(one: socket.socket) -> bytes:
    try:
        return one.recv(65536)
    except OSError:
        return b""


def _cut(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


def _is_whole(request: bytes) -> bool:
    headers, blank, body = request.partition(b"\r\n\r\n")
    for line in headers.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return bool(blank) and len(body) >= int(value)
    return bool(blank)


Answer = tuple[int, dict[str, str], bytes]


class Front:
    """An HTTP server that answers as a test tells it.

    Args:
        answer: the status, headers and body for a path, the request's headers and its body.
        certificate: a file with a key and a certificate; with it the server speaks TLS.
    """

    def __init__(
        self, answer: Callable[[str, dict[str, str], bytes], Answer], *, certificate: str | None = None
    ) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status, headers, content = answer(self.path, dict(self.headers.items()), body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self._server.handle_error = lambda *_: None  # type: ignore[method-assign] # a client that refuses is no error
        self.port: int = self._server.server_address[1]

    @classmethod
    @contextmanager
    def answering(
        cls, answer: Callable[[str, dict[str, str], bytes], Answer], *, certificate: str | None = None
    ) -> Iterator[Self]:
        """Begin, and end."""
        front = cls(answer, certificate=certificate)
        thread = threading.Thread(target=front._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield front
        finally:
            front._server.shutdown()
            front._server.server_close()
            thread.join(_LIMIT)
