"""When a transaction begins, how it gets the write lock, and when it may go on after others have written.

A transaction begins with its first statement: with ``BEGIN`` if that reads, so that whoever only reads never holds
the write lock; with ``BEGIN IMMEDIATE`` if it writes, so that it waits for the lock before it has read anything.

A transaction that has only read and wants to write needs the lock *and* an unchanged database. SQLite says only that
it can't write now, and by then waiting may be of no use. So the read transaction is given up, the lock is taken, and
the reads are run again under it. If they give the same rows, the transaction is one that ran under the lock from its
start. Else it has relied on something that is no longer true, and ends with ``SnapshotError``.
"""

from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto
from traceback import clear_frames
from typing import NoReturn, TypeVar

from aion_timers.libsql import forking
from aion_timers.libsql.driver import Description, RawConnection, RawCursor, Source, is_panic, needs_primary
from aion_timers.libsql.dropping import require_no_losses
from aion_timers.libsql.errors import (
    BusyError,
    ClosedError,
    DisconnectError,
    Error,
    OperationalError,
    ProgrammingError,
)
from aion_timers.libsql.reads import CHANGED, Reads, digest, stale
from aion_timers.libsql.replica import Claim, require_primary
from aion_timers.libsql.sql import (
    ATTACH,
    BUSY_TIMEOUT,
    DEFER_FOREIGN_KEYS,
    FOREIGN_KEYS,
    Kind,
    Parameters,
    Rows,
    Statement,
    Table,
    milliseconds,
    move_savepoint,
    quoted,
)
from aion_timers.libsql.waiting import Line, LockWait

_T = TypeVar("_T")
Outcome = tuple[RawCursor, Description | None, Rows | None]


class Level(Enum):
    """How a transaction begins."""

    SERIALIZABLE = "SERIALIZABLE"
    IMMEDIATE = "IMMEDIATE"
    AUTOCOMMIT = "AUTOCOMMIT"


class State(Enum):
    """Where a transaction is."""

    IDLE = auto()
    """Nothing is begun."""
    READING = auto()
    """Only reads so far: it can be begun again."""
    WRITING = auto()
    """Begun again, something would be lost."""
    LOST = auto()
    """Rolled back by SQLite or by us, and the caller hasn't called ``rollback()`` yet."""


_IDLE, _READING, _WRITING, _LOST = State
_READ, _WRITE = Kind.READ, Kind.WRITE
_BRACKETS = (Kind.BEGIN, Kind.SAVEPOINT, Kind.RELEASE)
_AUTOCOMMIT = Level.AUTOCOMMIT


class Transaction:
    """The transactions of one connection, one after the other."""

    def __init__(
        self, raw: RawConnection, source: Source, level: Level, timeout: float, claim: Claim | None = None
    ) -> None:
        self._raw: RawConnection | None = raw
        self._claim = claim
        self._is_replica = source.is_replica
        # after it, so that it is let go after it, too
        self._keeper = source.call(lambda: source.keeper(raw))
        self.source = source
        self.is_the_parents = False
        """Whether it was opened before this process was forked, and can't be used here."""
        self.timeout = timeout
        self.abandoned = False
        """Whether nobody waits for this connection any more, so that it need not wait for a lock either."""
        self.state = State.IDLE
        self._level = level
        self._line = source.line
        # the open ones, as long as a restart would have to set them again
        self._savepoints: list[str] = []
        self._reads = Reads()
        # no after PRAGMA defer_foreign_keys: a ROLLBACK, which a restart needs, would take it back
        self._restartable = True
        # whether the connection has more files than one
        self._attached = False
        if source.is_on_disk or source.is_networked:
            forking.remember(self)

    @property
    def raw(self) -> RawConnection:
        """The driver's connection."""
        if self._raw is None:
            if self.is_the_parents:
                raise DisconnectError(
                    "the connection stays with the process that opened it, and this one was forked from it: open"
                    " another one here"
                )
            raise ClosedError("the connection is closed")
        return self._raw

    @property
    def level(self) -> Level:
        """How the next transaction begins."""
        return self._level

    @level.setter
    def level(self, level: Level) -> None:
        if self.state is not _IDLE:
            raise ProgrammingError("the isolation level can't change inside a transaction: commit or roll back first")
        self._level = level

    # -- statements --------------------------------------------------------------------------------

    def execute(self, statement: Statement, sql: str, parameters: Parameters) -> Outcome | None:
        """Run a statement to its end, in a transaction as the level wants it.

        Args:
            statement: what is run.
            sql: its text, perhaps with parameters written into it.
            parameters: the others.

        Returns:
            The driver's cursor, the description and the rows; None where there was nothing to run.
        """
        kind = statement.kind
        if kind is _READ or kind is _WRITE:
            # where nothing is to be prepared a read may take no longer than it must
            ready = _IDLE if self._level is _AUTOCOMMIT else _WRITING
            if self.state is not ready or statement.drops is not None:
                self._prepare(kind, statement.drops)
            if kind is _WRITE and self.state is _IDLE:
                return self._run_alone(sql, parameters)
        elif self._control(statement):
            return None
        elif statement.name == BUSY_TIMEOUT:
            return self._wait_instead(statement)
        try:
            outcome = self._run(sql, parameters)
        except BaseException as error:  # noqa: BLE001 - the driver's panics are no Exception
            outcome = self._recover(kind, sql, parameters, error)
        if self._is_replica and self.state is not _IDLE and not self.raw.in_transaction:
            self._end_at_primary()
        if self.state is _READING:
            self._note(statement, sql, parameters, outcome[2])
        elif kind is not _READ and kind is not _WRITE and kind in _BRACKETS:
            self._follow(statement)
        return outcome

    def _prepare(self, kind: Kind, drops: Table | None) -> None:
        """Prepare for a statement that reads or writes, or drops a table."""
        if self.state is _IDLE:
            self._begin(kind)
        elif self.state is _LOST:
            self._refuse()
        elif self.state is _READING and kind is _WRITE and (self._attached or drops is not None):
            # SQLite would lock the file that is written, and not see that another one was read and has changed; and
            # what a dropped table takes with it is to be looked for in the newest snapshot
            self._restart()
        if drops is not None:
            require_no_losses(drops, self._fetch)

    def _control(self, statement: Statement) -> bool:
        """Prepare for a statement that neither reads nor writes; whether that was all there is to do."""
        kind, state = statement.kind, self.state
        match kind:
            case Kind.COMMIT:
                self.commit()
                return True
            case Kind.ROLLBACK:
                self.rollback()
                return True
            case Kind.ROLLBACK_TO if state is _LOST:
                # SQLAlchemy's clean-up after the error that lost the transaction; that error is the one to see
                return True
            case _ if state is _LOST:
                self._refuse()
            case Kind.SAVEPOINT | Kind.RELEASE | Kind.ROLLBACK_TO if state is _IDLE and self._level is not _AUTOCOMMIT:
                # held back: the first statement decides how the transaction begins
                move_savepoint(self._savepoints, kind, statement.name)
                return True
            case Kind.CONFIGURE if state is not _IDLE and statement.name == FOREIGN_KEYS:
                raise ProgrammingError(
                    "SQLite ignores PRAGMA foreign_keys inside a transaction: run it as the first statement after"
                    " commit() or rollback()"
                )
            case Kind.CONFIGURE if statement.name == DEFER_FOREIGN_KEYS:
                self._restartable = False
            case Kind.CONFIGURE if statement.name == ATTACH:
                if state is not _IDLE:
                    raise ProgrammingError("ATTACH inside a transaction would not lock the file: commit first")
                self._attached = True
        return False

    def _wait_instead(self, statement: Statement) -> Outcome:
        """Answer ``PRAGMA busy_timeout`` for SQLite, which would wait with the interpreter's lock: we wait for it."""
        if statement.kind is Kind.CONFIGURE:
            self.timeout = milliseconds(statement.sql) / 1000
        return self._run(f"SELECT {round(self.timeout * 1000)} AS timeout", ())

    def _note(self, statement: Statement, sql: str, parameters: Parameters, rows: Rows | None) -> None:
        """After a statement in a transaction that had only read."""
        kind = statement.kind
        if kind is _READ or kind is Kind.INSPECT:
            self._reads.remember(sql, parameters, rows)
        elif kind in (Kind.SAVEPOINT, Kind.RELEASE, Kind.ROLLBACK_TO):
            move_savepoint(self._savepoints, kind, statement.name)
        else:
            self.state = _WRITING
            self._reads.forget()

    def _follow(self, statement: Statement) -> None:
        """After a statement by which the caller begins or ends a transaction in SQL."""
        if not self.raw.in_transaction:
            self._end()
        elif self.state is _IDLE:
            self.state = _READING if statement.begins_deferred and self._restartable else _WRITING
            self._restore_savepoints()

    def _recover(self, kind: Kind, sql: str, parameters: Parameters, error: BaseException) -> Outcome:
        """After a statement that failed: try again where that is right, else raise."""
        failure = self._failure(error)
        if self.state is _READING and self._is_replica and needs_primary(failure):
            self._restart(writes=kind is _WRITE or kind is Kind.CONFIGURE)
            return self._attempt(lambda: self._run(sql, parameters))
        if isinstance(failure, BusyError):
            if self.state is _IDLE or (self.state is _READING and kind in (_READ, Kind.INSPECT)):
                return self._attempt(lambda: self._run(sql, parameters), busy=failure)
            if self.state is _READING:
                self._restart()
                return self._attempt(lambda: self._run(sql, parameters))
            if self.state is _WRITING:
                self._lose("it has done something that would be lost if it were begun again")
        if self.state is _READING:
            if kind is _READ or kind is Kind.INSPECT:
                self._reads.give_up("a read had failed")
            elif kind is _WRITE or kind is Kind.CONFIGURE:
                # it may have left something behind, as INSERT OR FAIL does
                self.state = _WRITING
                self._reads.forget()
        if failure is error:
            raise error
        raise failure from None

    def _end_at_primary(self) -> NoReturn:
        """After a statement for which the primary, started anew, had no transaction any more."""
        self.state = _LOST
        self._reads.forget()
        raise OperationalError(
            "the primary has lost the transaction: what it did before this statement is undone, and this statement may"
            " have been committed alone"
        )

    def _run(self, sql: str, parameters: Parameters) -> Outcome:
        cursor = (self._raw or self.raw).execute(sql, parameters)
        description = cursor.description or None
        return cursor, description, cursor.fetchall() if description else None

    def _run_alone(self, sql: str, parameters: Parameters) -> Outcome:
        """Run a statement that is a transaction of its own."""
        try:
            return self._take_lock(lambda: self._run(sql, parameters))
        finally:
            self._line.call()

    # -- begin, commit, roll back ------------------------------------------------------------------

    def _begin(self, kind: Kind) -> None:
        """Begin for a first statement of this kind."""
        if self._level is _AUTOCOMMIT:
            return
        raw = self.raw
        if kind is _READ and self._level is Level.SERIALIZABLE and self._restartable:
            # on a replica it reads what is there, until it has to ask the primary
            begin = "BEGIN READONLY" if self._is_replica and not self._savepoints else "BEGIN"
            self._attempt(lambda: raw.execute(begin))
            self.state = _READING
        else:
            self._take_lock(lambda: raw.execute("BEGIN IMMEDIATE"))
            self.state = _WRITING
        if self._savepoints:
            self._restore_savepoints()

    def commit(self) -> None:
        """Commit, waiting for readers where the journal mode needs that; whatever fails rolls back."""
        raw = self.raw
        if self.state is _LOST:
            self.rollback()
            raise OperationalError("nothing was committed: the transaction was rolled back after an error before")
        try:
            if raw.in_transaction:
                self._attempt(raw.commit)
        except BaseException:
            # SQLAlchemy sends no ROLLBACK after a COMMIT that failed
            if self._raw is not None:
                self.rollback()
            raise
        self._end()

    def rollback(self) -> None:
        """Roll back; without a transaction, or in a forked child, it does nothing."""
        if self.is_the_parents:
            return
        raw = self.raw
        try:
            if raw.in_transaction:
                self._attempt(raw.rollback)
        finally:
            self._end()

    def data_version(self) -> int:
        """What ``PRAGMA data_version`` says."""
        try:
            rows = self._run("PRAGMA data_version", ())[2]
        except BaseException as error:  # noqa: BLE001 - the driver's panics are no Exception
            raise self._failure(error) from None
        assert rows is not None  # noqa: S101 - for the type checker
        version: int = rows[0][0]  # type: ignore[assignment] # it is always an integer
        return version

    def sync(self) -> None:
        """Fetch what the primary of a replica has."""
        if not self._is_replica:
            raise ProgrammingError("only a replica can be synced: open it with connect_args={'sync_url': ...}")
        if self.state is not _IDLE:
            raise ProgrammingError("a replica can't be synced inside a transaction: commit or roll back first")
        raw = self.raw
        require_primary(self.source.options["sync_url"], self.timeout)
        self._attempt(raw.sync)

    def close(self) -> None:
        """Roll back and drop the driver's connection; a second call does nothing."""
        raw, self._raw = self._raw, None
        if raw is None:
            return
        try:
            if raw.in_transaction:
                self.source.call(raw.rollback)
        finally:
            self._end()
            try:
                self.source.call(raw.close)
            finally:
                self._let_go()

    def _let_go(self) -> None:
        """What has to outlive the driver's connection."""
        self._keeper = None
        if self._claim is not None:
            self._claim.release()

    def leave_to_parent(self) -> list[str]:
        """Close it in a forked child; what can't be closed stays open, and the paths of its files are returned."""
        raw, self._raw = self._raw, None
        self.is_the_parents = True
        paths: list[str] = []
        if raw is not None:
            # closing also rolls back, which is nothing to one that has only read
            if self.source.is_networked or (raw.in_transaction and self.state is not _READING):
                forking.keep((raw, self._keeper))
                paths.append(self.source.name)
                if self._attached:
                    paths += [str(path) for _, _, path in raw.execute("PRAGMA database_list").fetchall()]
            else:
                raw.close()
        self._keeper = None
        self._line = Line()  # those in the old one are threads of the parent
        self._end()
        return paths

    def _end(self) -> None:
        self.state = _IDLE
        self._savepoints.clear()
        self._reads.forget()
        self._restartable = True
        self._line.call()

    # -- from reading to writing -------------------------------------------------------------------

    def _restart(self, *, writes: bool = True) -> None:
        """Begin again with the write lock, or at a replica's primary, and see whether what was read is still so."""
        raw = self.raw
        snapshot = None
        if not self._is_replica:  # its numbers are not the primary's, so its reads are always compared
            try:
                snapshot = self._versions()
            except OperationalError:  # a remote database has no versions
                self._lose("another connection has written or is writing")
        self.source.call(raw.rollback)
        self.state = _LOST
        if snapshot is not None:
            self._require_unchanged(snapshot)  # else there is no use in waiting for the lock
        if writes:
            self._take_lock(lambda: raw.execute("BEGIN IMMEDIATE"))
        else:
            self._attempt(lambda: raw.execute("BEGIN"))
        self._require_unchanged(snapshot)
        self.state = _WRITING if writes else _READING
        self._restore_savepoints()
        if writes:
            self._reads.forget()

    def _versions(self) -> list[Rows]:
        """A number for each database that changes when another connection commits to it."""
        databases = self._fetch("PRAGMA database_list", ())
        names = [quoted(str(name)) for _, name, _ in databases if name != "temp"]
        return [self._fetch(f"PRAGMA {name}.data_version", ()) for name in names]

    def _require_unchanged(self, snapshot: list[Rows] | None) -> None:
        """Unless nobody has committed since, run the reads again and compare."""
        if snapshot is not None and self._versions() == snapshot:
            return
        if self._reads.unrepeatable:
            self._lose(self._reads.unrepeatable)
        for sql, parameters, before in self._reads:
            try:
                same = digest(self._fetch(sql, parameters)) == before
            except (BusyError, DisconnectError):
                raise
            except OperationalError:  # such as a table that is gone
                same = False
            if not same:
                self._lose(CHANGED)

    def _fetch(self, sql: str, parameters: Parameters) -> Rows:
        raw = self.raw
        return self._attempt(lambda: raw.execute(sql, parameters).fetchall())

    def _lose(self, reason: str) -> NoReturn:
        """End the transaction: it can't become one that is serializable."""
        raw = self.raw
        self.state = _LOST
        if raw.in_transaction:
            self.source.call(raw.rollback)
        if self._is_replica:
            with suppress(Error):  # else the next try would read what is old again
                self.source.call(raw.sync)
        self._reads.forget()
        self._line.call()
        raise stale(reason)

    # -- savepoints --------------------------------------------------------------------------------

    def _restore_savepoints(self) -> None:
        for name in self._savepoints:
            self.raw.execute(f"SAVEPOINT {quoted(name)}")
        if self.state is _WRITING:
            self._savepoints.clear()

    # -- calling the driver ------------------------------------------------------------------------

    def _take_lock(self, operation: Callable[[], _T]) -> _T:
        """Call an operation that takes the write lock, after those who wait for the lock in this process."""
        busy = None
        if self._line.first is None:
            try:
                return operation()
            except BaseException as error:  # noqa: BLE001 - the driver's panics are no Exception
                busy = self._busy(error)
        with self._line.place() as place:
            wait = LockWait(self.timeout, place.sleep)
            while not place.first:
                if self.abandoned or not wait.remaining:
                    raise self._too_long() from None
                place.sleep(min(wait.remaining, _LOOK_UP))
            return self._attempt(operation, wait=wait, busy=busy)

    def _attempt(
        self, operation: Callable[[], _T], *, wait: LockWait | None = None, busy: BusyError | None = None
    ) -> _T:
        """Call the driver, waiting here while it is busy: its own busy timeout would keep the interpreter's lock."""
        wait = wait or LockWait(self.timeout)
        while True:
            if busy is not None and (self.abandoned or not wait.pause()):
                raise self._too_long() from None
            try:
                return operation()
            except BaseException as error:  # noqa: BLE001 - the driver's panics are no Exception
                busy = self._busy(error)

    def _busy(self, error: BaseException) -> BusyError:
        """The error, if it says that somebody holds a lock; any other is raised."""
        failure = self._failure(error)
        if isinstance(failure, BusyError):
            return failure
        if failure is error:
            raise error
        raise failure from None

    def _too_long(self) -> BusyError:
        return BusyError(
            f"database is locked: another connection held the lock for longer than {self.timeout:g} s; keep"
            " transactions that write short, or wait longer with connect_args={'timeout': seconds}"
        )

    def _failure(self, error: BaseException) -> BaseException:
        """The error to raise for one of the driver; and whether SQLite rolled back because of it."""
        failure = self.source.translate(error)
        raw = self._raw
        if raw is None:
            return failure
        lost_primary = isinstance(failure, DisconnectError) and self._is_replica and not is_panic(error)
        if lost_primary and not raw.in_transaction:  # a replica can still read, unless the primary had the transaction
            failure = OperationalError(str(failure))
        if isinstance(failure, DisconnectError):
            self._raw = None
            self._end()
            # whatever still works of the driver releases the file's locks
            clear_frames(error.__traceback__)  # a cursor there would keep the file open
            with suppress(BaseException):
                raw.rollback()
            with suppress(BaseException):
                raw.close()
            self._let_go()
        elif self.state in (_READING, _WRITING) and not raw.in_transaction:
            self.state = _LOST
        return failure

    def _refuse(self) -> NoReturn:
        raise OperationalError("the transaction was rolled back after an error: call rollback() before anything else")


_LOOK_UP = 0.1  # seconds between looks, while others are first, at whether the wait was abandoned
