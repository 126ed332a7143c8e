"""A stream: the server's end of a connection, which it keeps from one request to the next, as long as it is not closed.

Each answer has a *baton* that the next request of the stream has to show. So an answer that is lost is the end of its
stream, and with it of the transaction; the server rolls that back.
"""

from __future__ import annotations

import json
import os
import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from aion_timers.libsql.errors import DisconnectError, Error, OperationalError, ProgrammingError
from aion_timers.libsql.hrana import protocol
from aion_timers.libsql.hrana.http import BrokenError, UnansweredError, UnsentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aion_timers.libsql.hrana.address import Server
    from aion_timers.libsql.hrana.http import Exchange, Reply

_SHOWN: Final = 300  # characters of an answer that a message shows


class LostError(DisconnectError):
    """The request was sent, and how it ended is not known."""

    broken = False
    """Whether that is because the connection ended."""


class Stream:
    """One stream after the other, with one server.

    Args:
        server: where it is.
        exchange: what carries the requests.
    """

    def __init__(self, server: Server, exchange: Exchange) -> None:
        self.server = server
        self.exchange = exchange
        self._versions: tuple[int, ...] = protocol.VERSIONS
        self._baton: str | None = None
        self._base = server.base
        self._process = os.getpid()

    @property
    def is_open(self) -> bool:
        """Whether the server keeps it for the next request."""
        return self._baton is not None

    def forget(self) -> None:
        """Go on with a new one; the server ends the old one some seconds later."""
        self._baton, self._base = None, self.server.base

    def send(
        self, requests: Sequence[protocol.Request], *, close: bool = False, repeatable: bool = False
    ) -> list[protocol.Result]:
        """Send requests in one round trip; what each of them gave.

        Args:
            requests: what to do, in this order.
            close: close the stream afterwards.
            repeatable: nothing is lost if a new stream does all of this twice.

        Raises:
            DisconnectError: the stream is gone, and what it had not committed.
            LostError: this request may have been done in part or whole.
            OperationalError: the server refuses.
        """
        if self._process != os.getpid():
            self._leave_to_parent()
        fresh = not self.is_open
        try:
            answer = self._answer(protocol.pipeline(self._baton, [*requests, protocol.CLOSE] if close else requests))
        except LostError as error:
            self.forget()
            if not (error.broken and fresh and repeatable):
                raise
            answer = self._answer(protocol.pipeline(None, [*requests, protocol.CLOSE] if close else requests))
        except BaseException:
            self.forget()
            raise
        return self._results(answer, len(requests), close=close)

    def _leave_to_parent(self) -> None:
        """In a forked child: the stream is the parent's."""
        was_open, self._process = self.is_open, os.getpid()
        self.forget()
        if was_open:
            raise DisconnectError(
                "the transaction belongs to the process that this one was forked from: call"
                " engine.dispose(close=False) first in a child process"
            )

    def _answer(self, body: bytes) -> protocol.Answer:
        for version in self._versions:
            reply = self._post(f"{self._base}/v{version}/pipeline", body)
            if reply.status != HTTPStatus.NOT_FOUND:
                self._versions = (version,)
                break
        if reply.status != HTTPStatus.OK:
            raise self._refusal(reply)
        try:
            return protocol.decode(reply.body)
        except protocol.MalformedError as error:
            raise LostError(f"{self.server.name} isn't a libSQL server, or not alone: {error}") from None

    def _post(self, url: str, body: bytes) -> Reply:
        try:
            return self.exchange.post(url, body)
        except UnsentError as error:
            raise DisconnectError(self._message(error)) from error
        except UnansweredError as error:
            lost = LostError(self._message(error))
            lost.broken = isinstance(error, BrokenError)
            raise lost from error

    def _message(self, error: Exception) -> str:
        return self.server.scrub(f"{self.server.name} {error}")

    def _results(self, answer: protocol.Answer, count: int, *, close: bool) -> list[protocol.Result]:
        if close:
            self.forget()
        else:
            self._baton = answer.baton
            try:
                self._base = self.server.continued(answer.base_url)
            except ProgrammingError as error:
                self.forget()
                raise OperationalError(str(error)) from None
            if answer.baton is None:
                raise DisconnectError(f"{self.server.name} has closed the stream")
        return answer.results[:count]

    # -- answers that are none -------------------------------------------------------------------------

    def _refusal(self, reply: Reply) -> Error:
        """The error for an answer with another status than 200."""
        name, status = self.server.name, reply.status
        told, code = self._told(reply.body)
        if code is not None:
            made = protocol.failure({"message": told, "code": code})
            if isinstance(made, DisconnectError):
                return made
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            cure = "another auth_token" if self.server.auth_token else "connect_args={'auth_token': ...}"
            made = OperationalError(f"{name} refuses access ({status}: {told}); give {cure}")
        elif 300 <= status < 400:  # noqa: PLR2004 - HTTP's redirects
            made = OperationalError(
                f"{name} redirects to {self._without_query(reply.location)}, and redirects aren't followed: give that"
                " address, with ?secure=true for https"
            )
        elif status == HTTPStatus.NOT_FOUND:
            made = OperationalError(f"{name} is no libSQL server, or has no such database ({status}: {told})")
        elif status == HTTPStatus.BAD_REQUEST and self.is_open:
            made = DisconnectError(f"{name} has lost the stream ({status}: {told})")
        elif status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            made = LostError(f"{name} failed ({status}: {told})")
        else:
            made = OperationalError(f"{name} refuses the request ({status}: {told})")
        made.code = code
        return made

    def _told(self, body: bytes) -> tuple[str, str | None]:
        """What a body says, in one line, and an error code if it has one."""
        text, code = body.decode(errors="replace"), None
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        if isinstance(answer, dict):
            text = str(answer.get("message") or answer.get("error") or text)
            code = answer.get("code") if isinstance(answer.get("code"), str) else None
        text = " ".join(re.sub(r"<[^>]*>", " ", text).split())
        # before it is cut, which might leave a part of the token
        return self.server.scrub(text)[:_SHOWN], code

    def _without_query(self, location: str) -> str:
        return self.server.scrub(re.sub(r"//[^/@]*@", "//", location.partition("?")[0]))[:_SHOWN]
