"""What an embedded replica needs beside the driver: a primary that answers, and its file to itself.

The driver waits for a primary without end, with the interpreter's lock in its hand. And two connections that write
what the primary has sent into one file, in one process or in two, damage it.
"""

import os
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Final
from urllib.parse import urlsplit
from weakref import WeakSet

from aion_timers.libsql.errors import OperationalError, ProgrammingError

SCHEMES: Final = ("http", "https", "libsql")


def require_primary(sync_url: object, timeout: float) -> None:
    """See that the primary answers, whatever it says, before the driver asks it.

    Raises:
        OperationalError: it doesn't, within so many seconds.
        ProgrammingError: the address is none.
    """
    try:
        parts = urlsplit(str(sync_url))
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    else:
        host = host if parts.scheme in SCHEMES else None
    if host is None:
        raise ProgrammingError(f"sync_url is the address of the primary, as in https://host, not {_shown(sync_url)}")
    secure = parts.scheme != "http"
    connection = (HTTPSConnection if secure else HTTPConnection)(host, port, timeout=timeout)
    try:
        connection.request("GET", "/health")
        connection.getresponse()
    except (OSError, HTTPException) as error:
        raise OperationalError(
            f"the replica's primary {without_secrets(str(sync_url))} does not answer"
            f" ({error or type(error).__name__}): see that it runs, and that sync_url names it; without it a replica"
            " that is open can be read, but none can be opened"
        ) from None
    finally:
        connection.close()


def without_secrets(address: str) -> str:
    """The address without credentials and query."""
    scheme, separator, rest = address.partition("?")[0].rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _shown(address: object) -> str:
    # what is no address may hold a secret all the same
    return repr(without_secrets(address)) if isinstance(address, str) else f"a {type(address).__name__}"


class Claim:
    """A lock that one connection has on a replica, among all processes; it is on a file beside the replica.

    Raises:
        OperationalError: another connection has it, or the file can't be made.
    """

    def __init__(self, path: str) -> None:
        import fcntl  # noqa: PLC0415 - Windows has none, nor has it the driver

        self._descriptor: int | None = None
        try:
            descriptor = os.open(f"{path}-replica", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OperationalError(
                f"{path} can't be opened: {error.strerror}; check that its directory exists and that this user may"
                " write to it"
            ) from None
        self._descriptor = descriptor
        _claims.add(self)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.release()
            raise OperationalError(
                f"{path} can't be opened: another connection has this replica open, and two would damage it; give the"
                " engine a single connection, as in create_engine(..., pool_size=1, max_overflow=0), and every process"
                " a file of its own"
            ) from None

    def release(self) -> None:
        """Let others have it; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    __del__ = release


_claims: WeakSet[Claim] = WeakSet()


def _forget_claims() -> None:
    """After a fork: the lock is the parent's, and would outlast it here."""
    for claim in list(_claims):
        claim.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_claims)
