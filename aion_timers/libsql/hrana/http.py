"""How a request gets to the server and its answer back: once with httpx's sync transport, once with its async one.

The transports alone, without the clients around them, whose redirects, cookies and logins the protocol has no use for:
they take a tenth of a round trip to a server on the same machine.

HTTP connections are kept alive and shared by all connections of a process, or of an event loop, that have the same
settings. They are closed with the last of these. A child process that was forked opens its own.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
import threading
import time
from contextlib import aclosing, closing, suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass
from weakref import WeakKeyDictionary

try:
    import httpcore
    import httpx

    from aion_timers.libsql.hrana.network import AsyncioBackend
except ImportError as error:
    raise ModuleNotFoundError(
        "libSQL servers need httpx: pip install 'aion-timers[server]'; for async engines aion-timers[server,asyncio]"
    ) from error

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator, MutableMapping


class UnsentError(Exception):
    """The server has not got the request."""


class UnansweredError(Exception):
    """The server may have got the request, and perhaps has done all of it."""


class BrokenError(UnansweredError):
    """The connection ended first, as one that was kept alive may do at the moment when it is used again."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How HTTP connections are made, and how long they may take.

    Args:
        connect_timeout: seconds until there is a connection, TLS included.
        read_timeout: seconds in which nothing comes from the server or goes to it.
        request_timeout: seconds from the beginning of a request to the end of its answer.
        ssl_context: how the server's certificate is checked; None for the usual way.
        proxy: the address of an HTTP proxy on the way; None for none.
    """

    connect_timeout: float
    read_timeout: float
    request_timeout: float
    ssl_context: ssl.SSLContext | None = None
    proxy: str | None = field(default=None, repr=False)  # it may have a password

    def timeout(self) -> httpx.Timeout:
        """The limits that httpx keeps."""
        return httpx.Timeout(self.read_timeout, connect=self.connect_timeout)

    def options(self) -> dict[str, Any]:
        """The arguments of httpx's transports."""
        # SQLAlchemy's pool is the limit, and who waits there is told so
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=_IDLE)
        return {"limits": limits, "verify": self.ssl_context or _usual_context(), "proxy": self.proxy}


_THREAD: Final = "aion_timers.libsql"
_MOST_WAIT: Final = 1.0  # seconds, at an exit or a fork
_IDLE: Final = 30.0  # seconds: what lies between may have forgotten a connection that was silent for longer


@cache
def _usual_context() -> ssl.SSLContext:
    # it reads all certificates that there are, which takes a while
    return httpx.create_ssl_context()


def proxy_for(address: str) -> str | None:
    """The proxy that the environment wants for an address: ``HTTPS_PROXY`` and so on, but for ``NO_PROXY``."""
    parts = urlsplit(address)
    if proxy_bypass(parts.hostname or ""):
        return None
    proxies = getproxies()
    found = proxies.get(parts.scheme) or proxies.get("all")
    return found if found is None or "://" in found else f"http://{found}"


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back."""

    status: int
    location: str
    """Where a redirect points to."""
    body: bytes


class Exchange(Protocol):
    """Sends requests, and waits. Sync code calls it; the async one waits in SQLAlchemy's greenlet."""

    def post(self, url: str, body: bytes) -> Reply:
        """Send a request.

        Raises:
            UnansweredError: it may have arrived.
            UnsentError: it has not.
        """

    def tell(self, url: str, body: bytes) -> None:
        """Send a request and don't wait for its answer, whatever that is.

        There is one at a time: it waits for the answer to the one before.
        """

    def sleep(self, seconds: float) -> None:
        """Wait."""

    def close(self) -> None:
        """Let go of the HTTP connections, and close them if nobody else uses them; what was told is answered before."""

    def drop(self) -> None:
        """The same where nothing can be awaited."""


def _why(error: Exception, settings: Settings) -> UnsentError | UnansweredError:
    """What an error of httpx's means."""
    match error:
        case httpx.ConnectTimeout():
            return UnsentError(f"can't be reached within {settings.connect_timeout:g} s (connect_timeout)")
        case httpx.ConnectError() | httpx.ProxyError() | httpx.UnsupportedProtocol() | httpx.LocalProtocolError():
            return UnsentError(f"can't be reached ({error})")
        case httpx.TimeoutException():
            return UnansweredError(f"was silent for {settings.read_timeout:g} s (read_timeout)")
        case TimeoutError():
            return UnansweredError(f"took longer than {settings.request_timeout:g} s (request_timeout)")
    return BrokenError(f"broke the connection off ({str(error) or type(error).__name__})")


class _Requests:
    """Makes requests: the parts that are always the same are made once."""

    def __init__(self, settings: Settings, headers: dict[str, str]) -> None:
        self._headers = httpx.Headers(headers)
        self._extensions = {"timeout": settings.timeout().as_dict()}

    def post(self, url: str, body: bytes) -> httpx.Request:
        return httpx.Request("POST", _url(url), headers=self._headers, content=body, extensions=self._extensions)


_url = lru_cache(maxsize=128)(httpx.URL)


def _reply(response: httpx.Response, body: bytes) -> Reply:
    return Reply(response.status_code, response.headers.get("location", ""), body)


# -- shared transports -------------------------------------------------------------------------------------------------


class _Shared:
    """A transport and how many use it."""

    def __init__(self, transport: Any) -> None:  # noqa: ANN401 - either of httpx's
        self.transport = transport
        self.users = 0


_mutex = threading.Lock()
_sync: dict[Settings, _Shared] = {}
# an async transport belongs to the event loop that it was made in
_async: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Settings, _Shared]] = WeakKeyDictionary()


def _take(transports: MutableMapping[Settings, _Shared], settings: Settings, make: Any) -> _Shared:  # noqa: ANN401 - a class
    with _mutex:
        shared = transports.get(settings)
        if shared is None:
            shared = transports[settings] = _Shared(make(**settings.options()))
        shared.users += 1
        return shared


def _give_back(transports: MutableMapping[Settings, _Shared], settings: Settings, shared: _Shared) -> bool:
    """Whether nobody uses the transport any more."""
    with _mutex:
        shared.users -= 1
        if shared.users == 0 and transports.get(settings) is shared:
            del transports[settings]
    return shared.users == 0


def _thread(work: Callable[[], None]) -> threading.Thread | None:
    """A thread that does this; None where none can begin."""
    if sys.is_finalizing():  # Python 3.11 would wait for it for ever
        return None
    thread = threading.Thread(target=work, name=_THREAD, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def _wait_for_threads() -> None:
    deadline = time.monotonic() + _MOST_WAIT
    for thread in threading.enumerate():
        if thread.name == _THREAD:
            thread.join(max(0.0, deadline - time.monotonic()))


# else it ends before it has sent what it shall
atexit.register(_wait_for_threads)


def _after_fork() -> None:
    """In a child: the transports, and perhaps the mutex, are the parent's."""
    global _mutex  # noqa: PLW0603 - a thread of the parent may have held it
    _mutex = threading.Lock()
    # not closed: that would end TLS on connections that the parent goes on using
    _sync.clear()
    _async.clear()


if hasattr(os, "register_at_fork"):
    # a child has but one thread, so a lock that another one holds at that moment is held in it for ever
    os.register_at_fork(before=_wait_for_threads, after_in_child=_after_fork)


# -- sync --------------------------------------------------------------------------------------------------------------


class SyncExchange:
    """Blocks the thread, and no other."""

    def __init__(self, settings: Settings, headers: dict[str, str]) -> None:
        self._settings = settings
        self._requests = _Requests(settings, headers)
        self._process = os.getpid()
        self._shared: _Shared | None = _take(_sync, settings, httpx.HTTPTransport)
        self._telling: threading.Thread | None = None

    def _transport(self) -> httpx.HTTPTransport:
        if self._shared is None or self._process != os.getpid():
            self._process = os.getpid()
            self._shared = _take(_sync, self._settings, httpx.HTTPTransport)
        transport: httpx.HTTPTransport = self._shared.transport
        return transport

    def post(self, url: str, body: bytes) -> Reply:
        """Send a request; the total timeout is looked at whenever something comes."""
        return self._post(self._transport(), url, body)

    def _post(self, transport: httpx.HTTPTransport, url: str, body: bytes) -> Reply:
        deadline = time.monotonic() + self._settings.request_timeout
        try:
            with closing(transport.handle_request(self._requests.post(url, body))) as response:
                return _reply(response, b"".join(_until(deadline, response.iter_bytes())))
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            raise _why(error, self._settings) from error

    def tell(self, url: str, body: bytes) -> None:
        """Send a request in a thread that ends with its answer."""
        self._wait()
        transport = self._transport()

        def send() -> None:
            with suppress(UnsentError, UnansweredError):
                self._post(transport, url, body)

        self._telling = _thread(send)
        if self._telling is None:
            send()

    def _wait(self) -> None:
        thread, self._telling = self._telling, None
        # in that thread garbage may be collected, and with it the connection
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    def close(self) -> None:
        """Let go of the HTTP connections, and close them if nobody else uses them."""
        try:
            self._wait()
        finally:
            self.drop()

    def drop(self) -> None:
        """The same without waiting."""
        shared, self._shared = self._shared, None
        if shared is not None and self._process == os.getpid() and _give_back(_sync, self._settings, shared):
            shared.transport.close()


def _until(deadline: float, chunks: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        if time.monotonic() > deadline:
            raise TimeoutError


# -- async -------------------------------------------------------------------------------------------------------------


def _async_transport(**options: Any) -> httpx.AsyncHTTPTransport:  # noqa: ANN401 - httpx's
    transport = httpx.AsyncHTTPTransport(**options)
    pool: object = getattr(transport, "_pool", None)
    if isinstance(pool, httpcore.AsyncConnectionPool):
        # httpx hands on all that the pool can be told but this; if it calls these another day, its own way serves, too
        pool._network_backend = AsyncioBackend()  # noqa: SLF001
    return transport


class AsyncExchange:
    """Lets the event loop go on. Its methods are called in SQLAlchemy's greenlet."""

    def __init__(self, settings: Settings, headers: dict[str, str]) -> None:
        # here, since sync engines need no greenlet
        from sqlalchemy.util.concurrency import await_  # noqa: PLC0415 - greenlet is an extra

        self._await = await_
        self._settings = settings
        self._requests = _Requests(settings, headers)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._shared: _Shared | None = None
        self._telling: asyncio.Task[None] | None = None

    def _transport(self) -> httpx.AsyncHTTPTransport:
        loop = asyncio.get_running_loop()
        if self._shared is None or self._loop is not loop:
            # one of another loop can't be closed in this one
            self._loop = loop
            self._shared = _take(_async.setdefault(loop, {}), self._settings, _async_transport)
        transport: httpx.AsyncHTTPTransport = self._shared.transport
        return transport

    def post(self, url: str, body: bytes) -> Reply:
        """Send a request."""
        reply: Reply = self._await(self._post(self._transport(), url, body))
        return reply

    async def _post(self, transport: httpx.AsyncHTTPTransport, url: str, body: bytes) -> Reply:
        try:
            async with asyncio.timeout(self._settings.request_timeout):
                response = await transport.handle_async_request(self._requests.post(url, body))
                async with aclosing(response):
                    return _reply(response, await response.aread())
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            raise _why(error, self._settings) from error

    def tell(self, url: str, body: bytes) -> None:
        """Send a request in a task that ends with its answer."""
        self._wait()
        transport = self._transport()

        async def send() -> None:
            with suppress(UnsentError, UnansweredError):
                await self._post(transport, url, body)

        self._telling = asyncio.get_running_loop().create_task(send())

    def _wait(self) -> None:
        task, self._telling = self._telling, None
        # one of another loop has ended with that
        if task is not None and task.get_loop() is asyncio.get_running_loop():
            self._await(asyncio.wait([task]))

    def sleep(self, seconds: float) -> None:
        """Wait."""
        self._await(asyncio.sleep(seconds))

    def close(self) -> None:
        """Let go of the HTTP connections, and close them if nobody else uses them."""
        try:
            self._wait()
        finally:
            if shared := self._leave():
                self._await(shared.transport.aclose())

    def drop(self) -> None:
        """Let go of them where nothing can be awaited; they are closed when they are collected as garbage."""
        self._leave()

    def _leave(self) -> _Shared | None:
        shared, self._shared = self._shared, None
        loop, self._loop = self._loop, None
        if shared is None or loop is None:
            return None
        last = _give_back(_async.get(loop, {}), self._settings, shared)
        return shared if last and not loop.is_closed() else None
