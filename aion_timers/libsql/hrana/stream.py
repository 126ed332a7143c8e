"""A stream: the server's end of a connection, which it keeps from one request to the next, as long as it is not closed.

Each answer has a *baton* that the next request of the stream has to show. So an answer that is lost is the end of its
stream, and with it of the transaction; the server rolls that back.

To make a stream costs a server more than to run a statement, and to keep one costs it one of the connections that it
allows, 128 with sqld. So a stream is kept after its transaction only while one follows the other.

Nobody need wait for the end of a transaction that has only read. But who doesn't has no baton to go on with, so that
closes the stream. It is done where no other transaction is expected, or the server is so far away that to wait would
take longer than to make a stream. The end could also travel with the transaction that follows; but until then it would
hold a snapshot, and a server can't begin its log anew while any connection of any client holds one.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from aion_timers.libsql.errors import BusyError, DisconnectError, Error, OperationalError, ProgrammingError
from aion_timers.libsql.hrana import protocol
from aion_timers.libsql.hrana.http import BrokenError, UnansweredError, UnsentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aion_timers.libsql.hrana.address import Server
    from aion_timers.libsql.hrana.http import Exchange, Reply

_SHOWN: Final = 300  # characters of an answer that a message shows
_SERIES: Final = 0.1  # seconds: one transaction that begins so soon after another is thought to be followed by a third
_NEAR: Final = 0.002  # seconds for a round trip: to make a stream takes sqld some 0.5 ms more than to go on with one
_KEPT: Final = 5.0  # seconds: sqld ends a stream that was silent for 10


class LostError(DisconnectError):
    """The request was sent, and how it ended is not known."""

    broken = False
    """Whether that is because the connection ended."""


class GoneError(DisconnectError):
    """The server has the stream no more, so it has not looked at the request."""


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
        # whether the stream, if there is one, is between two transactions; and when the last one was over
        self._is_kept = False
        self._over_at = -math.inf
        self._in_series = False
        # in seconds, as far as is known
        self._shortest_trip = math.inf

    @property
    def is_to_stay(self) -> bool:
        """Whether to wait for the end of its transaction and keep it costs less than to make another one."""
        is_far = _NEAR <= self._shortest_trip < math.inf
        return self._in_series and not is_far

    @property
    def is_open(self) -> bool:
        """Whether the server holds it for a transaction that is not over."""
        return self._baton is not None and not self._is_kept

    def forget(self) -> None:
        """Go on with a new one; the server ends the old one some seconds later."""
        self._baton, self._base, self._is_kept = None, self.server.base, False

    def leave(self) -> None:
        """Close it, if there is one, and with it the transaction that it holds."""
        is_ours = self._process == os.getpid()
        try:
            if self._baton is not None and is_ours:
                self._answer(protocol.pipeline(self._baton, [protocol.CLOSE]))
        except OperationalError:  # so it has ended
            pass
        finally:
            self.forget()

    def leave_unheard(self, requests: Sequence[protocol.Request] = ()) -> None:
        """The same after these requests, without waiting for what becomes of any of it."""
        try:
            if self._baton is not None and self._process == os.getpid():
                self._over_at = time.monotonic()
                body = protocol.pipeline(self._baton, [*requests, protocol.CLOSE])
                self.exchange.tell(self._url(self._versions[0]), body)
        finally:
            self.forget()

    def send(
        self, requests: Sequence[protocol.Request], *, close: bool = False, repeatable: bool = False
    ) -> list[protocol.Result]:
        """Send requests in one round trip; what each of them gave.

        Args:
            requests: what to do, in this order.
            close: no transaction is open afterwards, so the stream can be closed.
            repeatable: nothing is lost if a new stream does all of this twice.

        Raises:
            BusyError: the server has begun nothing of it, and the stream is as it was.
            DisconnectError: the stream is gone, and what it had not committed.
            LostError: this request may have been done in part or whole.
            OperationalError: the server refuses.
        """
        if self._process != os.getpid():
            self._leave_to_parent()
        begins = not self.is_open
        if begins:
            self._begin()
        closes = close and not self._in_series
        sent = [*requests, protocol.CLOSE] if closes else requests
        try:
            answer = self._answer(protocol.pipeline(self._baton, sent))
        except (GoneError, LostError) as error:
            self.forget()
            undone = isinstance(error, GoneError) or (error.broken and repeatable)
            if not (begins and undone):
                raise
            answer = self._answer(protocol.pipeline(None, sent))
        except BusyError:
            raise
        except BaseException:
            self.forget()
            raise
        if close:
            self._over_at = time.monotonic()
        self._take_baton(None if closes else answer.baton, answer.base_url, is_over=close)
        return answer.results[: len(requests)]

    def _begin(self) -> None:
        """Before the first request of a transaction: look whether the stream before can go on."""
        silence = time.monotonic() - self._over_at
        self._in_series = silence < _SERIES
        if silence > _KEPT:
            self.forget()

    def _take_baton(self, baton: str | None, base_url: str | None, *, is_over: bool) -> None:
        """Make the next request one of the same stream; that it can't be matters only to a transaction that goes on."""
        problem: Error | None = None
        if baton is None:
            problem = DisconnectError(f"{self.server.name} has closed the stream")
        else:
            try:
                self._base = self.server.continued(base_url)
            except ProgrammingError as error:
                problem = OperationalError(str(error))
        if problem is None:
            self._baton, self._is_kept = baton, is_over
            return
        self.forget()
        if not is_over:
            raise problem

    def _leave_to_parent(self) -> None:
        """In a forked child: the stream is the parent's."""
        was_open, self._process = self.is_open, os.getpid()
        self.forget()
        if was_open:
            raise DisconnectError(
                "the transaction belongs to the process that this one was forked from: call"
                " engine.dispose(close=False) first in a child process"
            )

    def _url(self, version: int) -> str:
        return f"{self._base}/v{version}/pipeline"

    def _answer(self, body: bytes) -> protocol.Answer:
        for version in self._versions:
            reply = self._post(self._url(version), body)
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
        start, worked = time.monotonic(), time.process_time()
        try:
            reply = self.exchange.post(url, body)
        except UnsentError as error:
            raise DisconnectError(self._message(error)) from error
        except UnansweredError as error:
            lost = LostError(self._message(error))
            lost.broken = isinstance(error, BrokenError)
            raise lost from error
        trip = time.monotonic() - start
        # a process that is busy itself makes each of them long
        if 2 * (time.process_time() - worked) < trip:
            self._shortest_trip = min(self._shortest_trip, trip)
        return reply

    def _message(self, error: Exception) -> str:
        return self.server.scrub(f"{self.server.name} {error}")

    # -- answers that are none -------------------------------------------------------------------------

    def _refusal(self, reply: Reply) -> Error:
        """The error for an answer with another status than 200."""
        name, status = self.server.name, reply.status
        told, code = self._told(reply.body)
        if code is not None:
            made = protocol.failure({"message": told, "code": code})
            if isinstance(made, DisconnectError):
                gone = GoneError(str(made))
                gone.code = code
                return gone
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
        elif status == HTTPStatus.BAD_REQUEST and self._baton is not None:
            made = GoneError(f"{name} has lost the stream ({status}: {told})")
        elif status == HTTPStatus.TOO_MANY_REQUESTS:
            made = BusyError(f"{name} takes no more requests for now ({status}: {told})")
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
