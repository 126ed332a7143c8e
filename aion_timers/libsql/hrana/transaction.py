"""Transactions on a server: the three levels that a file has, in as few round trips as there can be.

BEGIN travels with the first statement, and the stream is closed together with COMMIT or ROLLBACK. Nobody waits for the
end of a transaction that has only read, unless that is cheaper. So a read is one round trip, the stream's beginning and
end included, as any statement is at level AUTOCOMMIT.

A transaction that has only read and finds that it can't write is begun again under the write lock, together with its
reads. If these give the same rows it goes on; else it ends with ``SnapshotError``, as one on a file does.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

from aion_timers.libsql.dropping import require_no_losses
from aion_timers.libsql.errors import (
    BusyError,
    ClosedError,
    DisconnectError,
    Error,
    OperationalError,
    OutcomeUnknownError,
    ProgrammingError,
)
from aion_timers.libsql.hrana import protocol
from aion_timers.libsql.hrana.protocol import ResultSet, Steps
from aion_timers.libsql.hrana.stream import LostError
from aion_timers.libsql.reads import CHANGED, Reads, digest, stale
from aion_timers.libsql.sql import (
    BUSY_TIMEOUT,
    DEFER_FOREIGN_KEYS,
    FOREIGN_KEYS,
    Kind,
    Statement,
    milliseconds,
    move_savepoint,
    parse,
    quoted,
)
from aion_timers.libsql.transaction import Level, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from aion_timers.libsql.hrana.stream import Stream
    from aion_timers.libsql.sql import Parameters, Rows, Table

_Encoded = dict[str, Any]

_READS: Final = (Kind.READ, Kind.INSPECT)
_SAVEPOINTS: Final = (Kind.SAVEPOINT, Kind.RELEASE, Kind.ROLLBACK_TO)
_NOTHING: Final = ResultSet((), [], 0, None)
_MOST_STEPS: Final = 500  # in one request
_MOST_CHARACTERS: Final = 1_000_000
_FIRST_PAUSE: Final = 0.005  # seconds; the server has a queue of its own, so it says seldom that it is busy
_LONGEST_PAUSE: Final = 0.25


class _Wait:
    """The pauses between tries, until ``timeout`` seconds have passed."""

    def __init__(self, timeout: float, sleep: Callable[[float], None]) -> None:
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._sleep = sleep
        self._pause = _FIRST_PAUSE

    def pause(self, busy: Error) -> None:
        """Wait a moment, or raise a ``BusyError`` when the time is over."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            error = BusyError(
                f"{busy}: the server was busy for longer than {self._timeout:g} s; keep transactions that write short,"
                " or wait longer with connect_args={'timeout': seconds}"
            )
            error.code = busy.code
            raise error from None
        self._sleep(min(left, random.uniform(self._pause / 2, self._pause)))  # noqa: S311 - jitter, no secret
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)


@dataclass(frozen=True, slots=True)
class _Ran:
    """How far the statements of a request came."""

    begun: bool
    """Whether those that had to be run before them went well."""
    results: list[ResultSet]
    """Of those that went well, before the first one that did not."""
    error: Error | None
    over: bool
    """Whether there is no transaction any more that could go on."""


class Transaction:
    """The transactions of one connection, one after the other."""

    def __init__(self, stream: Stream, level: Level, timeout: float) -> None:
        self._stream: Stream | None = stream
        self.source = stream.server
        self.timeout = timeout
        self.state = State.IDLE
        self._level = level
        # the open ones, and those that are held back until something is begun
        self._savepoints: list[str] = []
        # whether it began with a SAVEPOINT, and ends with the RELEASE of that
        self._by_savepoint = False
        # PRAGMA foreign_keys: a stream knows nothing of those before it
        self._setting = ""
        # PRAGMA defer_foreign_keys, which holds for one transaction
        self._deferral = ""
        self._reads = Reads()

    @property
    def stream(self) -> Stream:
        """Its streams."""
        if self._stream is None:
            raise ClosedError("the connection is closed")
        return self._stream

    @property
    def level(self) -> Level:
        """How the next transaction begins."""
        return self._level

    @level.setter
    def level(self, level: Level) -> None:
        if self.state is not State.IDLE:
            raise ProgrammingError("the isolation level can't change inside a transaction: commit or roll back first")
        self._level = level

    # -- statements --------------------------------------------------------------------------------

    def execute(self, statement: Statement, parameters: Parameters) -> ResultSet | None:
        """Run a statement, in a transaction as the level wants it; None where there was nothing to run."""
        kind = statement.kind
        encoded = protocol.statement(statement.sql, parameters)
        if kind not in (Kind.READ, Kind.WRITE) and self._control(statement):
            return None
        if statement.name == BUSY_TIMEOUT:
            return self._wait_instead(statement)
        if statement.drops is not None:
            self._prepare_to_drop(statement.drops)
        result = self._execute(statement, [encoded])[0]
        if kind in _READS:
            if self.state is State.READING:
                self._reads.remember(statement.sql, parameters, result.rows)
        elif kind in _SAVEPOINTS:
            self._follow(statement)
        elif kind is Kind.CONFIGURE and statement.name == FOREIGN_KEYS:
            self._setting = statement.sql
        return result

    def execute_many(self, statement: Statement, parameters: Iterable[Parameters]) -> int:
        """Run a statement that writes, with one set of parameters after the other; how many rows it has changed."""
        changed = size = 0
        chunk: list[_Encoded] = []
        for one in parameters:
            encoded = protocol.statement(statement.sql, one, want_rows=False)
            chunk.append(encoded)
            size += len(str(encoded))
            if len(chunk) == _MOST_STEPS or size >= _MOST_CHARACTERS:
                changed += self._change(statement, chunk)
                chunk, size = [], 0
        return changed + self._change(statement, chunk) if chunk else changed

    def _change(self, statement: Statement, chunk: Sequence[_Encoded]) -> int:
        return sum(result.changed for result in self._execute(statement, chunk))

    def ping(self) -> None:
        """See whether the server answers; it begins no transaction."""
        if self.stream.is_open:
            self._go_on(Kind.INSPECT, [protocol.statement("SELECT 1")])
        else:
            self._send([], close=True, repeatable=True)

    def _control(self, statement: Statement) -> bool:
        """Prepare for a statement that neither reads nor writes; whether that was all there is to do."""
        kind, idle = statement.kind, self.state is State.IDLE
        held_back = idle and self._level is not Level.AUTOCOMMIT
        match kind:
            case Kind.COMMIT:
                self.commit()
                return True
            case Kind.ROLLBACK:
                self.rollback()
                return True
            case Kind.ROLLBACK_TO if self.state is State.LOST:
                # SQLAlchemy's clean-up after the error that lost the transaction; that error is the one to see
                return True
            case Kind.SAVEPOINT | Kind.RELEASE | Kind.ROLLBACK_TO if held_back:
                # the first statement decides how the transaction begins
                move_savepoint(self._savepoints, kind, statement.name)
                return True
            case Kind.CONFIGURE if statement.name == FOREIGN_KEYS and not idle:
                raise ProgrammingError(
                    "SQLite ignores PRAGMA foreign_keys inside a transaction: run it as the first statement after"
                    " commit() or rollback()"
                )
            case Kind.CONFIGURE if statement.name == DEFER_FOREIGN_KEYS and held_back:
                self._deferral = statement.sql
                return True
        return False

    def _wait_instead(self, statement: Statement) -> ResultSet:
        """Answer ``PRAGMA busy_timeout`` for the server, which has its own: it is how long we try again."""
        if statement.kind is Kind.CONFIGURE:
            self.timeout = milliseconds(statement.sql) / 1000
        return ResultSet(("timeout",), [(round(self.timeout * 1000),)], 0, None)

    def _prepare_to_drop(self, table: Table) -> None:
        """See that dropping a table changes no row of another one, in the transaction that drops it."""
        if self.state is State.IDLE and self._level is not Level.AUTOCOMMIT:
            self._begin(_IMMEDIATE, [], reading=False)
        elif self.state is State.READING:
            self._begin_again()
        require_no_losses(table, self._fetch)

    def _fetch(self, sql: str, parameters: Parameters) -> Rows:
        return self._execute(parse(sql), [protocol.statement(sql, parameters)])[0].rows

    def _execute(self, statement: Statement, encoded: Sequence[_Encoded]) -> list[ResultSet]:
        """Run statements that are the same but for their parameters."""
        kind = statement.kind
        if self.state is State.LOST:
            raise OperationalError(
                "the transaction was rolled back after an error: call rollback() before anything else"
            )
        if self.state is not State.IDLE:
            return self._go_on(kind, encoded)
        if kind in (Kind.BEGIN, Kind.SAVEPOINT):
            self._begin(statement.sql, [], reading=statement.begins_deferred)
            self._by_savepoint = kind is Kind.SAVEPOINT
            return [_NOTHING]
        if self._level is Level.AUTOCOMMIT or kind not in (Kind.READ, Kind.WRITE):
            return self._alone(kind, encoded)
        reading = kind is Kind.READ and self._level is Level.SERIALIZABLE
        return self._begin("BEGIN" if reading else _IMMEDIATE, encoded, reading=reading)

    # -- without a transaction ---------------------------------------------------------------------

    def _alone(self, kind: Kind, encoded: Sequence[_Encoded]) -> list[ResultSet]:
        """Run statements each of which is a transaction of its own."""
        results: list[ResultSet] = []
        wait = self._wait()
        while True:
            try:
                ran = self._run(self._settings(), encoded[len(results) :], close=True, repeatable=kind in _READS)
            except LostError as error:
                if kind is Kind.WRITE:
                    raise _unknown(error) from error
                raise
            results += ran.results
            if ran.error is None:
                return results
            if not isinstance(ran.error, BusyError):
                raise ran.error
            wait.pause(ran.error)

    # -- in a transaction --------------------------------------------------------------------------

    def _begin(self, begin: str, encoded: Sequence[_Encoded], *, reading: bool) -> list[ResultSet]:
        """Begin a transaction together with its first statements."""
        head = [*self._settings(), *self._beginning(begin)]
        wait = self._wait()
        while True:
            # nothing is committed, so all of it can be done twice
            ran = self._run(head, encoded, repeatable=True)
            if ran.error is None or (ran.begun and not isinstance(ran.error, BusyError)):
                break
            self.stream.leave()
            if not isinstance(ran.error, BusyError):
                raise ran.error
            wait.pause(ran.error)
        self.state = State.READING if reading else State.WRITING
        if ran.error is not None:
            self._fail(ran, reads=reading)
        return ran.results

    def _go_on(self, kind: Kind, encoded: Sequence[_Encoded]) -> list[ResultSet]:
        """Run statements in the transaction that is open."""
        reads = kind in _READS
        wait = self._wait()
        ran = self._run([], encoded)
        while isinstance(ran.error, BusyError) and not ran.over:
            if self.state is State.WRITING:
                self._lose("it has done something that would be lost if it were begun again")
            if reads:
                wait.pause(ran.error)
            else:
                self._begin_again()
            ran = self._run([], encoded)
        if ran.error is not None:
            self._fail(ran, reads=reads)
        if self.state is State.READING and not reads and kind not in _SAVEPOINTS:
            self._write()
        return ran.results

    def _fail(self, ran: _Ran, *, reads: bool) -> NoReturn:
        """Raise the error of a statement, and see what it means for the transaction."""
        assert ran.error is not None  # noqa: S101 - for the type checker
        if ran.over:
            self.state = State.LOST
        elif self.state is State.READING:
            if reads:
                self._reads.give_up("a read had failed")
            else:
                # it may have left something behind, as INSERT OR FAIL does
                self._write()
        raise ran.error

    def _write(self) -> None:
        self.state = State.WRITING
        self._reads.forget()

    def _begin_again(self) -> None:
        """Begin again with the write lock, and see whether what was read is still so."""
        if self._reads.unrepeatable:
            self._lose(self._reads.unrepeatable)
        self.state = State.LOST
        reads = list(self._reads)
        again = [protocol.statement(sql, parameters) for sql, parameters, _ in reads]
        back = protocol.batch([protocol.step(protocol.statement("ROLLBACK"))])
        wait = self._wait()
        while True:
            ran = self._run(self._beginning(_IMMEDIATE), again, before=[back])
            if not isinstance(ran.error, BusyError):
                break
            wait.pause(ran.error)
        if not ran.begun and ran.error is not None:
            raise ran.error
        # a read that fails now finds a table gone, for instance
        if [digest(result.rows) for result in ran.results] != [before for _, _, before in reads]:
            self._lose(CHANGED)
        self._write()

    def _lose(self, reason: str) -> NoReturn:
        """End the transaction: it can't become one that is serializable."""
        self.state = State.LOST
        self.stream.leave()
        raise stale(reason)

    def commit(self) -> None:
        """Commit; whatever fails rolls back."""
        state = self.state
        if state is State.LOST:
            self.rollback()
            raise OperationalError("nothing was committed: the transaction was rolled back after an error before")
        try:
            if error := self._finish("COMMIT"):
                raise error
        except LostError as lost:
            if state is State.WRITING:
                raise _unknown(lost) from lost
            raise
        finally:
            self._end()

    def rollback(self) -> None:
        """Roll back; without a transaction it does nothing. What the server has lost is rolled back there, too."""
        try:
            self._finish("ROLLBACK")
        except OperationalError:
            pass
        finally:
            self._end()

    def _finish(self, sql: str) -> Error | None:
        """End what the server holds, with this statement; the error of that."""
        stream = self.stream
        if not stream.is_open:
            return None
        end = protocol.statement(sql)
        if self.state is State.READING and not stream.is_to_stay:
            # COMMIT, too, is said: a function in a SELECT may have written, which its text doesn't tell
            stream.leave_unheard([protocol.batch([protocol.step(end)])])
            return None
        return self._run([], [end], close=True).error

    def close(self, *, quietly: bool = False) -> None:
        """Roll back and let go of the HTTP connections; a second call does nothing.

        Args:
            quietly: without a round trip; the server rolls back some seconds later.
        """
        if self._stream is None:
            return
        stream = self._stream
        try:
            if not quietly:
                self.rollback()
                # a server allows so many at a time, and those of pools that come and go would add up
                stream.leave()
        finally:
            self._stream = None
            if quietly:
                stream.exchange.drop()
            else:
                stream.exchange.close()

    def _end(self) -> None:
        self.state = State.IDLE
        self._savepoints.clear()
        self._by_savepoint = False
        self._deferral = ""
        self._reads.forget()

    # -- savepoints --------------------------------------------------------------------------------

    def _follow(self, statement: Statement) -> None:
        """After a statement that has moved the server's list of savepoints."""
        if self.state is State.IDLE:
            return
        move_savepoint(self._savepoints, statement.kind, statement.name)
        if self._by_savepoint and not self._savepoints:
            self.stream.leave_unheard()
            self._end()

    # -- requests ----------------------------------------------------------------------------------

    def _settings(self) -> list[_Encoded]:
        return [protocol.statement(self._setting)] if self._setting else []

    def _beginning(self, begin: str) -> list[_Encoded]:
        """The statements that a transaction begins with."""
        texts = [begin, *([self._deferral] if self._deferral else [])]
        return [protocol.statement(text) for text in [*texts, *map(_savepoint, self._savepoints)]]

    def _wait(self) -> _Wait:
        return _Wait(self.timeout, self.stream.exchange.sleep)

    def _send(self, requests: Sequence[protocol.Request], *, close: bool, repeatable: bool) -> list[protocol.Result]:
        """Send requests in one round trip, again while the server takes none."""
        wait = self._wait()
        while True:
            try:
                return self.stream.send(requests, close=close, repeatable=repeatable)
            except BusyError as error:
                wait.pause(error)

    def _run(
        self,
        head: Sequence[_Encoded],
        encoded: Sequence[_Encoded],
        *,
        before: Sequence[protocol.Request] = (),
        close: bool = False,
        repeatable: bool = False,
    ) -> _Ran:
        """Run statements in one round trip, each if the one before it went well.

        Args:
            head: what has to be run before them.
            encoded: the statements.
            before: requests that may fail.
            close: no transaction is open afterwards.
            repeatable: nothing is lost if all of it is done twice.
        """
        steps = protocol.chain([*head, *encoded])
        if close:
            # a COMMIT that fails must leave nothing to the next transaction of the stream
            steps.append(protocol.unless_done(len(steps) - 1, "ROLLBACK"))
        elif encoded:
            # works only if SQLite has ended the transaction because of an error, as INSERT OR ROLLBACK does
            steps.append(protocol.unless_done(len(steps) - 1, "BEGIN", after=len(head) - 1 if head else None))
        try:
            result = self._send([*before, protocol.batch(steps)], close=close, repeatable=repeatable)[-1]
        except BaseException:
            # whoever goes on without a rollback() shall not do so in another transaction
            if self.state is not State.IDLE:
                self.state = State.LOST
            raise
        if not isinstance(result, Steps):
            if close:
                self.stream.leave()
            error = result or OperationalError(f"{self.source.name} gave no result")
            # else it is not known how many of the steps were done
            untouched = error.code in protocol.REFUSED_UNREAD
            return _Ran(begun=not untouched, results=[], error=error, over=not untouched)
        outcomes = result.outcomes[: len(head) + len(encoded)]
        done: list[ResultSet] = []
        failure: Error | None = None
        for outcome in outcomes:
            if not isinstance(outcome, ResultSet):
                failure = outcome or OperationalError("an earlier statement has failed")
                break
            done.append(outcome)
        if close and failure is not None:
            self.stream.leave()
        over = isinstance(failure, DisconnectError) or isinstance(result.outcomes[-1], ResultSet)
        return _Ran(len(done) >= len(head), done[len(head) :], failure, over=over and failure is not None)


_IMMEDIATE: Final = "BEGIN IMMEDIATE"


def _savepoint(name: str) -> str:
    return f"SAVEPOINT {quoted(name)}"


def _unknown(error: LostError) -> OutcomeUnknownError:
    return OutcomeUnknownError(f"{error}; whether it was committed is not known: look before you do it again")
