"""How httpcore gets from an event loop to the network: by asyncio's own streams.

By way of anyio, as httpcore does it elsewhere, a round trip to a server on the same machine takes a tenth longer.
"""

from __future__ import annotations

import asyncio
import select
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import httpcore

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable, Iterator

    from httpcore import SOCKET_OPTION

_BETWEEN_ADDRESSES: Final = 0.25  # seconds until the next address of a host is tried, too, as RFC 8305 has it

_EXTRA: Final = {"ssl_object": "ssl_object", "socket": "socket", "client_addr": "sockname", "server_addr": "peername"}
"""What httpcore may ask about a connection, and what asyncio calls it."""


@contextmanager
def _errors(timeout: type[Exception], other: type[Exception]) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise timeout(str(error)) from error
    except OSError as error:  # those of TLS are also of this class
        raise other(str(error)) from error


class AsyncioStream(httpcore.AsyncNetworkStream):
    """A connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - httpcore's
        """What has come, once something has; nothing is the end."""
        with _errors(httpcore.ReadTimeout, httpcore.ReadError):
            async with asyncio.timeout(timeout):
                return await self._reader.read(max_bytes)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - httpcore's
        """Send, and wait while the other end takes nothing."""
        with _errors(httpcore.WriteTimeout, httpcore.WriteError):
            async with asyncio.timeout(timeout):
                self._writer.write(buffer)
                await self._writer.drain()

    async def aclose(self) -> None:
        """Close at once, also if something has not been sent: nobody waits for an answer."""
        self._writer.transport.abort()
        await asyncio.sleep(0)  # the loop closes the socket

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's
    ) -> AsyncioStream:
        """Go on with TLS."""
        try:
            with _errors(httpcore.ConnectTimeout, httpcore.ConnectError):
                async with asyncio.timeout(timeout):
                    await self._writer.start_tls(ssl_context, server_hostname=server_hostname)
        except BaseException:
            await self.aclose()
            raise
        return self

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401 - of many types
        """What httpcore asks; of an idle connection, whether it is of no use any more."""
        if info == "is_readable":
            return self._writer.is_closing() or _is_readable(self._writer.get_extra_info("socket").fileno())
        return self._writer.get_extra_info(_EXTRA[info]) if info in _EXTRA else None


def _is_readable(descriptor: int) -> bool:
    # not only what the loop has seen, which may not have come round since
    if not hasattr(select, "poll"):
        return bool(select.select([descriptor], [], [], 0)[0])
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


class AsyncioBackend(httpcore.AsyncNetworkBackend):
    """Makes connections."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's
        local_address: str | None = None,
        socket_options: Iterable[SOCKET_OPTION] | None = None,
    ) -> AsyncioStream:
        """Connect to the first address of a host that answers."""
        local = None if local_address is None else (local_address, 0)
        with _errors(httpcore.ConnectTimeout, httpcore.ConnectError):
            async with asyncio.timeout(timeout):
                reader, writer = await asyncio.open_connection(
                    host, port, local_addr=local, happy_eyeballs_delay=_BETWEEN_ADDRESSES
                )
        for option in socket_options or ():
            writer.get_extra_info("socket").setsockopt(*option)
        return AsyncioStream(reader, writer)

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)
