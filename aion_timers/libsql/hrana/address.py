"""Where a server is, and the token that it wants. No text shows the token."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from aion_timers.libsql.errors import ProgrammingError

_BASE = re.compile(r"https?://[^/?#\s@]+(/[^?#\s]*)?", re.IGNORECASE)
_HIDDEN: Final = "***"
# what a header's value may hold
_TOKEN = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class Server:
    """A server's address.

    Args:
        base: ``http://`` or ``https://``, host, port, and the path that all requests begin with.
        auth_token: what the server is shown with each request.

    Raises:
        ProgrammingError: one of the two isn't what it should be.
    """

    base: str
    auth_token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.base, str) or not _BASE.fullmatch(self.base):
            raise ProgrammingError(
                "a server's address is http://host:port or https://host:port, perhaps with a path; a token is given as"
                " auth_token"
            )
        if self.auth_token is not None and not (isinstance(self.auth_token, str) and _TOKEN.fullmatch(self.auth_token)):
            raise ProgrammingError("auth_token is a str of visible ASCII characters")

    @property
    def name(self) -> str:
        """The address as messages name it."""
        return self.base

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        # between two processes of a machine an answer is packed and unpacked for nothing
        encoding = "identity" if is_loopback(urlsplit(self.base).hostname or "") else "gzip, deflate"
        headers = {"accept-encoding": encoding, "content-type": "application/json"}
        if self.auth_token is not None:
            headers["authorization"] = f"Bearer {self.auth_token}"
        return headers

    def scrub(self, text: str) -> str:
        """The text without the token, which a server may echo."""
        return text.replace(self.auth_token, _HIDDEN) if self.auth_token else text

    def continued(self, base: str | None) -> str:
        """The address for a stream's next request, which the server may have given.

        Raises:
            ProgrammingError: it isn't an address, or less safe than the first one.
        """
        if base is None:
            return self.base
        given = Server(base.rstrip("/"))
        if self.base.lower().startswith("https:") and not base.lower().startswith("https:"):
            raise ProgrammingError(f"{self.name} wants its stream to be continued without TLS, at {given.name}")
        return given.base


def is_loopback(host: str) -> bool:
    """Whether what is sent to this host stays on this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")
