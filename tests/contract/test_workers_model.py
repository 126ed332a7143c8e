"""Workers whose transactions are open at once, who crash and lose leases, do what a plain model of rows and locks does.

Where the model says that a statement has to wait, it is either run with hardly any patience, and has to fail and change
nothing, or it is begun in another thread before the transaction that it waits for is ended, and has to do what it
would have done after that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, get_args
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from aion_timers import Claim, IfExists, LeaseLost, Settlement, Timer, TimerEntry, TimerId
from tests.conftest import open_engine
from tests.store import Store

NOW = datetime(2026, 6, 3, 2, 30, tzinfo=UTC)
SECOND = timedelta(seconds=1)

Key = tuple[UUID, TimerId]

workflows = st.sampled_from([UUID(int=1), UUID(int=2)])
keys = st.tuples(workflows, st.sampled_from(["a", "b", 3]).map(TimerId.of))
seconds = st.integers(-3, 3).map(lambda number: number * SECOND)
leases = st.integers(1, 4).map(lambda number: number * SECOND)
policies = st.sampled_from(get_args(IfExists))
places = st.integers(0, 1)


@dataclass(frozen=True)
class Row:
    """A timer of the model."""

    fire_at: datetime
    claim: Claim | None = None
    until: datetime | None = None
    attempts: int = 0

    def stored(self) -> tuple[Any, ...]:
        """What the table shows of it."""
        return self.fire_at, self.claim.token if self.claim else None, self.until, self.attempts


@dataclass(eq=False)
class Firing:
    """A handler's transaction: what it has changed, and what it has locked."""

    session: Any
    timers: Any
    claim: Claim
    changes: dict[Key, Row | None] = field(default_factory=dict)
    locked: set[Key] = field(default_factory=set)
    deleted: set[Key] = field(default_factory=set)


def place(claim: Claim) -> Key:
    return claim.timer.workflow_id, claim.timer.timer_id


class Machine(RuleBasedStateMachine):
    """Drives a store and the model with one clock, which steps forward and backward."""

    store: Store
    hasty: Store
    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.rows: dict[Key, Row] = {}
        self.firing: list[Firing] = []
        with self.store.timers() as timers:
            for entry in timers.expired(datetime.max.replace(tzinfo=UTC)):
                timers.cancel(entry.workflow_id, entry.timer_id)

    def teardown(self) -> None:
        """Keep nothing."""
        for firing in self.firing:
            firing.session.close()

    # -- the model

    def is_held(self, row: Row) -> bool:
        """Whether somebody's lease on it runs."""
        return row.until is not None and row.until > self.now

    def owner(self, key: Key) -> Firing | None:
        """Whose transaction has the key locked."""
        return next((firing for firing in self.firing if key in firing.locked), None)

    def waits(self, key: Key, *, for_new: bool = False) -> bool:
        """Whether a statement that changes this timer waits, or one that could insert it."""
        if self.store.is_sqlite:
            return bool(self.firing)
        return self.owner(key) is not None and (for_new or key in self.rows)

    def alive(self, claim: Claim, rows: dict[Key, Row] | None = None) -> Row | None:
        """The row that a claim holds."""
        row = (self.rows if rows is None else rows).get(place(claim))
        return row if row is not None and row.claim == claim else None

    def seen_by(self, firing: Firing) -> dict[Key, Row]:
        """The rows as a transaction sees them: what was committed, and what it has done itself."""
        seen = {**self.rows, **firing.changes}
        return {key: row for key, row in seen.items() if row is not None}

    def moves(self, row: Row | None, fire_at: datetime, if_exists: str) -> bool:
        """Whether who schedules changes the row."""
        if row is None or self.is_held(row):
            return True
        return {
            "replace": True,
            "keep": False,
            "earliest": fire_at < row.fire_at,
            "latest": fire_at > row.fire_at,
        }[if_exists]

    # -- the store

    def alone(self, work: Callable[[Any], Any], *, waits: bool) -> Any:
        """The result of a transaction of its own; None if it has to wait for another one, and so does nothing."""
        if not waits:
            with self.hasty.timers(clock=lambda: self.now) as timers:
                return work(timers)
        with pytest.raises(DBAPIError), self.hasty.timers(clock=lambda: self.now) as timers:
            work(timers)
        return None

    # -- time

    @rule(delta=seconds)
    def step_clock(self, delta: timedelta) -> None:
        """Time passes, so that leases run out, or the clock is set back."""
        self.now += delta

    # -- hosts

    @rule(key=keys, delta=seconds, if_exists=policies, many=st.booleans())
    def schedule(self, key: Key, delta: timedelta, if_exists: Any, many: bool) -> None:
        """Schedule one, alone or as a batch."""
        fire_at = self.now + delta
        waits = self.waits(key, for_new=True)
        if many:
            changed = self.alone(
                lambda timers: timers.schedule_many([TimerEntry(*key, fire_at)], if_exists=if_exists) == 1, waits=waits
            )
        else:
            changed = self.alone(lambda timers: timers.schedule(*key, fire_at, if_exists=if_exists), waits=waits)
        if waits:
            return
        assert changed is self.moves(self.rows.get(key), fire_at, if_exists)
        if changed:
            self.rows[key] = Row(fire_at)

    @rule(key=keys, whole=st.booleans())
    def cancel(self, key: Key, whole: bool) -> None:
        """Cancel one, or those of a workflow, held or not."""
        gone = [other for other in self.rows if (other[0] == key[0] if whole else other == key)]
        waits = any(self.waits(other) for other in gone) or (self.store.is_sqlite and bool(self.firing))
        changed = self.alone(
            lambda timers: timers.cancel_workflow(key[0]) if whole else int(timers.cancel(*key)), waits=waits
        )
        if not waits:
            assert changed == len(gone)
            for other in gone:
                del self.rows[other]

    # -- workers

    def due(self, limit: int) -> list[Key]:
        """What is due, and neither held nor locked, in order."""
        entries = sorted(
            TimerEntry(*key, row.fire_at)
            for key, row in self.rows.items()
            if row.fire_at <= self.now and not self.is_held(row) and self.owner(key) is None
        )
        return [(entry.workflow_id, entry.timer_id) for entry in entries[:limit]]

    @rule(limit=st.integers(1, 4))
    def take(self, limit: int) -> None:
        """Take what is free."""
        waits = self.store.is_sqlite and bool(self.firing)
        found = self.alone(lambda timers: timers.take(limit=limit), waits=waits)
        if not waits:
            taken = self.due(limit)
            assert [(entry.workflow_id, entry.timer_id) for entry in found] == taken
            for key in taken:
                del self.rows[key]

    @rule(target=claims, limit=st.integers(1, 4), lease=leases, late=st.booleans())
    def claim(self, limit: int, lease: timedelta, late: bool) -> Any:
        """Claim what is free, or what was held for too long, too."""
        if late:
            self.now += 5 * SECOND
        waits = self.store.is_sqlite and bool(self.firing)
        found: list[Claim] = self.alone(lambda timers: timers.claim(limit=limit, lease=lease), waits=waits)
        if waits:
            return multiple()
        self.claimed(found, self.due(limit), lease)
        return multiple(*found)

    def claimed(self, found: list[Claim], due: list[Key], lease: timedelta) -> None:
        """Check and enter claims."""
        assert [place(claim) for claim in found] == due
        for claim in found:
            row = self.rows[place(claim)]
            assert (claim.timer.fire_at, claim.attempt) == (row.fire_at, row.attempts + 1)
            assert claim.timer.fire_at <= self.now
            self.rows[place(claim)] = replace(row, claim=claim, until=self.now + lease, attempts=claim.attempt)

    @initialize(target=claims, key=keys, lease=leases)
    def fire_at_first(self, key: Key, lease: timedelta) -> Any:
        """Begin where something can meet."""
        return self.fire(key, lease)

    @precondition(lambda self: len(self.firing) < (1 if self.store.is_sqlite else 2))
    @rule(target=claims, key=keys, lease=leases)
    def fire(self, key: Key, lease: timedelta) -> Any:
        """All the way: a timer falls due, is claimed with others, and its handler opens a transaction."""
        if self.owner(key):
            return multiple()
        self.schedule(key, timedelta(0), "replace", many=False)
        found: list[Claim] = self.alone(lambda timers: timers.claim(limit=9, lease=lease), waits=False)
        self.claimed(found, self.due(9), lease)
        self.begin(next(claim for claim in found if place(claim) == key))
        return multiple(*found)

    @rule(claim=consumes(claims))
    def crash(self, claim: Claim) -> None:
        """A worker is gone, and with it what it knew of its claim; the lease goes on until it runs out."""

    @rule(claim=claims, how=st.sampled_from(["complete", "release", "retry", "extend"]), delta=seconds, lease=leases)
    def settle(self, claim: Claim, how: str, delta: timedelta, lease: timedelta) -> None:
        """Settle what may be lost, or locked by the handler of somebody."""
        retry_at = self.now + delta if how == "retry" else None
        calls: dict[str, Callable[[Any], Settlement]] = {
            "complete": lambda timers: timers.complete(claim),
            "extend": lambda timers: timers.extend(claim, lease=lease),
        }
        waits = self.store.is_sqlite and bool(self.firing)
        found = self.alone(calls.get(how, lambda timers: timers.release(claim, retry_at=retry_at)), waits=waits)
        if waits:
            return
        key, row = place(claim), self.alive(claim)
        fate = "lost" if row is None else "busy" if self.owner(key) else "done"
        for name in ("done", "busy", "lost"):
            assert getattr(found, name) == ((claim,) if name == fate else ())
        if row is None or fate == "busy":
            return
        if how == "complete":
            del self.rows[key]
        elif how == "extend":
            self.rows[key] = replace(row, until=self.now + lease)
        else:
            self.rows[key] = Row(retry_at or row.fire_at, attempts=row.attempts)

    # -- handlers with a transaction

    @precondition(lambda self: len(self.firing) < 2)
    @rule(claim=claims)
    def begin(self, claim: Claim) -> None:
        """A handler opens its transaction: it has the timer then, or loses it, or has to wait."""
        key = place(claim)
        session = self.hasty.new_session()
        timers = self.hasty.repository(session, clock=lambda: self.now)
        try:
            if self.store.is_sqlite and self.firing:
                with pytest.raises(DBAPIError):
                    timers.confirm(claim)
            elif not self.alive(claim):
                with pytest.raises(LeaseLost):
                    timers.confirm(claim)
            elif self.owner(key):
                with pytest.raises(DBAPIError):
                    timers.confirm(claim)
            else:
                timers.confirm(claim)
                self.firing.append(Firing(session, timers, claim, locked={key}))
                return
        except BaseException:
            session.close()
            raise
        session.close()

    def chosen(self, number: int) -> Firing:
        """One of the transactions."""
        return self.firing[number % len(self.firing)]

    @precondition(lambda self: self.firing)
    @rule(number=places, key=keys, delta=seconds, if_exists=policies, own=st.booleans())
    def schedule_inside(self, number: int, key: Key, delta: timedelta, if_exists: Any, own: bool) -> None:
        """A handler schedules its own timer again, or another."""
        firing = self.chosen(number)
        key = place(firing.claim) if own else key
        if self.owner(key) not in {None, firing}:
            return
        fire_at = self.now + delta
        moves = self.moves(self.seen_by(firing).get(key), fire_at, if_exists)
        assert firing.timers.schedule(*key, fire_at, if_exists=if_exists) is moves
        firing.locked.add(key)
        if moves:
            firing.changes[key] = Row(fire_at)

    @precondition(lambda self: self.firing)
    @rule(number=places, key=keys, own=st.booleans())
    def cancel_inside(self, number: int, key: Key, own: bool) -> None:
        """A handler cancels its own timer, or another."""
        firing = self.chosen(number)
        key = place(firing.claim) if own else key
        if self.waits(key) and self.owner(key) is not firing and not self.store.is_sqlite:
            return
        found = key in self.seen_by(firing)
        assert firing.timers.cancel(*key) is found
        if found:
            firing.locked.add(key)
            firing.deleted.add(key)
            firing.changes[key] = None

    @precondition(lambda self: self.firing)
    @rule(number=places, how=st.sampled_from(["complete", "complete", "raise", "die"]))
    def end(self, number: int, how: str) -> None:
        """A handler comes to its end, or raises, or its process dies."""
        self.finish(self.chosen(number), how)

    def finish(self, firing: Firing, how: str) -> None:
        """End a transaction, and enter what it has done."""
        match how:
            case "complete":
                claim = firing.claim
                is_mine = self.alive(claim, self.seen_by(firing)) is not None
                found = firing.timers.complete(claim)
                assert (found.done, found.lost) == (((claim,), ()) if is_mine else ((), (claim,)))
                firing.session.commit()
                if is_mine:
                    firing.changes[place(claim)] = None
                for key, row in firing.changes.items():
                    if row is None:
                        self.rows.pop(key, None)
                    else:
                        self.rows[key] = row
            case "raise":
                firing.session.rollback()
            case _:
                self.kill(firing)
        firing.session.close()
        self.firing.remove(firing)

    def kill(self, firing: Firing) -> None:
        """Cut a connection in the middle of its transaction."""
        if not self.store.is_sqlite:
            number = firing.session.connection().connection.driver_connection.info.backend_pid
            # which waits until its locks are gone
            assert self.store.sql(f"SELECT pg_terminate_backend({number}, 10000)") == [(True,)]
        firing.session.invalidate()

    # -- who waits for a handler

    def while_it_waits(self, work: Callable[[Any], Any], end: Callable[[], None]) -> Any:
        """The result of what another begins before a transaction ends, and can do only afterwards."""
        found: list[Any] = []

        def run() -> None:
            with self.store.timers(clock=lambda: self.now) as timers:
                found.append(work(timers))

        thread = threading.Thread(target=run)
        thread.start()
        waiting = text("SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'")
        until = time.monotonic() + 10
        if self.store.is_sqlite:
            time.sleep(0.002)
        else:
            with self.store.engine.connect() as connection:
                while connection.execute(waiting).first() is None:
                    assert time.monotonic() < until, "it does not wait"
        end()
        thread.join()
        assert len(found) == 1
        return found[0]

    @precondition(lambda self: self.firing)
    @rule(
        number=places, how=st.sampled_from(["complete", "complete", "raise", "die"]), delta=seconds, if_exists=policies
    )
    def schedule_meanwhile(self, number: int, how: str, delta: timedelta, if_exists: Any) -> None:
        """Another schedules the timer that a handler has in its transaction."""
        firing = self.chosen(number)
        key, fire_at = place(firing.claim), self.now + delta
        changed = self.while_it_waits(
            lambda timers: timers.schedule(*key, fire_at, if_exists=if_exists), lambda: self.finish(firing, how)
        )
        assert changed is self.moves(self.rows.get(key), fire_at, if_exists)
        if changed:
            self.rows[key] = Row(fire_at)

    @precondition(lambda self: self.firing)
    @rule(number=places, how=st.sampled_from(["complete", "complete", "raise", "die"]))
    def cancel_meanwhile(self, number: int, how: str) -> None:
        """Another cancels the timer that a handler has in its transaction."""
        firing = self.chosen(number)
        key = place(firing.claim)
        if key in firing.deleted and firing.changes[key] is not None and not self.store.is_sqlite:
            return  # what was cancelled and scheduled anew is a new row, which who waits for the old one doesn't see
        changed = self.while_it_waits(lambda timers: timers.cancel(*key), lambda: self.finish(firing, how))
        assert changed is (self.rows.pop(key, None) is not None)

    @precondition(lambda self: self.firing)
    @rule(number=places, how=st.sampled_from(["complete", "complete", "raise", "die"]))
    def confirm_meanwhile(self, number: int, how: str) -> None:
        """The same claim is confirmed twice: the second finds it settled, or has it."""
        firing = self.chosen(number)
        claim = firing.claim

        def confirm(timers: Any) -> bool:
            try:
                timers.confirm(claim)
            except LeaseLost:
                return False
            return True

        assert self.while_it_waits(confirm, lambda: self.finish(firing, how)) is (self.alive(claim) is not None)

    # -- what holds at all times

    @invariant()
    def the_table_is_as_the_model_says(self) -> None:
        """What was committed is what the model has, leases and attempts included."""
        with self.store.session() as session:
            found = {
                (timer.workflow_id, timer.timer_id): (
                    timer.fire_at,
                    timer.lease_token,
                    timer.lease_until,
                    timer.attempts,
                )
                for timer in session.scalars(select(Timer))
            }
        assert found == {key: row.stored() for key, row in self.rows.items()}


@pytest.mark.parametrize("backend", ["libsql", "psycopg"], indirect=True)
@pytest.mark.parametrize(
    ("examples", "steps"), [(50, 25), pytest.param(500, 60, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_workers_whose_transactions_meet_do_what_the_model_does(store: Store, examples: int, steps: int) -> None:
    patience: dict[str, Any] = {"timeout": 0.01} if store.is_sqlite else {"options": "-c lock_timeout=10ms"}
    if not store.is_sqlite:
        # it may lock the whole table for a moment, and who has no patience would fail
        store.sql("ALTER TABLE timers SET (autovacuum_enabled = off)")
    hasty = Store(store.backend, open_engine(store.engine.url, connect_args=patience), store.runner)
    try:
        run_state_machine_as_test(  # type: ignore[no-untyped-call] # Hypothesis' own
            type("BoundMachine", (Machine,), {"store": store, "hasty": hasty}),
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        hasty.close()
