"""Any sequence of schedules, cancels, claims and settlements by several workers does what a plain model does."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, get_args
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from aion_timers import Claim, IfExists, LeaseLost, TimerEntry, TimerId
from tests.store import Store

NOW = datetime(2026, 6, 3, 2, 30, tzinfo=UTC)
SECOND = timedelta(seconds=1)

workflows = st.sampled_from([UUID(int=1), UUID(int=2)])
names = st.sampled_from(["a", "b", "retry-1", 3])
seconds = st.integers(-5, 5).map(lambda number: number * SECOND)
leases = st.integers(1, 4).map(lambda number: number * SECOND)
limits = st.integers(1, 4)
filters = st.sampled_from([None, ["a"], ["retry-*", "b"]])


@dataclass
class Row:
    """A timer of the model."""

    fire_at: datetime
    claim: Claim | None = None
    until: datetime = NOW
    attempts: int = 0


class Machine(RuleBasedStateMachine):
    """Drives a store and the model with one clock, which steps forward and backward."""

    store: Store
    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.rows: dict[tuple[UUID, TimerId], Row] = {}
        self.session = self.store.new_session()
        self.timers: Any = self.store.repository(self.session, clock=lambda: self.now)
        for entry in self.timers.expired(datetime.max.replace(tzinfo=UTC)):
            self.timers.cancel(entry.workflow_id, entry.timer_id)

    def teardown(self) -> None:
        """Keep nothing."""
        self.session.rollback()
        self.session.close()

    def is_held(self, row: Row) -> bool:
        """Whether somebody's lease on it runs."""
        return row.claim is not None and row.until > self.now

    def due(self, limit: int, wanted: Any) -> list[tuple[UUID, TimerId]]:
        """The keys that may be taken or claimed now, in order."""
        entries = sorted(
            TimerEntry(*key, row.fire_at)
            for key, row in self.rows.items()
            if row.fire_at <= self.now and not self.is_held(row) and matches(key[1], wanted)
        )
        return [(entry.workflow_id, entry.timer_id) for entry in entries[:limit]]

    def alive(self, claim: Claim) -> Row | None:
        """The row that a claim holds."""
        row = self.rows.get((claim.timer.workflow_id, claim.timer.timer_id))
        return row if row is not None and row.claim == claim else None

    @rule(delta=seconds)
    def step_clock(self, delta: timedelta) -> None:
        """Time passes, or the clock is set back."""
        self.now += delta

    @rule(
        workflow=workflows, name=names, delta=seconds, if_exists=st.sampled_from(get_args(IfExists)), many=st.booleans()
    )
    def schedule(self, workflow: UUID, name: Any, delta: timedelta, if_exists: Any, many: bool) -> None:
        """Schedule one, alone or as a batch."""
        entry = TimerEntry(workflow, name, self.now + delta)
        key = (workflow, entry.timer_id)
        row = self.rows.get(key)
        moves = (
            row is None
            or self.is_held(row)
            or {
                "replace": True,
                "keep": False,
                "earliest": entry.fire_at < row.fire_at,
                "latest": entry.fire_at > row.fire_at,
            }[if_exists]
        )
        if many:
            assert self.timers.schedule_many([entry], if_exists=if_exists) == int(moves)
        else:
            assert self.timers.schedule(workflow, name, entry.fire_at, if_exists=if_exists) is moves
        if moves:
            self.rows[key] = Row(entry.fire_at)

    @rule(workflow=workflows, name=names)
    def cancel(self, workflow: UUID, name: Any) -> None:
        """Cancel one, held or not."""
        key = (workflow, TimerId.of(name))
        assert self.timers.cancel(workflow, name) is (self.rows.pop(key, None) is not None)

    @rule(workflow=workflows)
    def cancel_workflow(self, workflow: UUID) -> None:
        """Cancel those of a workflow, held or not."""
        gone = [key for key in self.rows if key[0] == workflow]
        assert self.timers.cancel_workflow(workflow) == len(gone)
        for key in gone:
            del self.rows[key]

    @rule(limit=limits, wanted=filters)
    def take(self, limit: int, wanted: Any) -> None:
        """Take what is due and free."""
        keys = self.due(limit, wanted)
        assert [(entry.workflow_id, entry.timer_id) for entry in self.timers.take(limit=limit, names=wanted)] == keys
        for key in keys:
            del self.rows[key]

    @rule(target=claims, limit=limits, lease=leases, wanted=filters)
    def claim(self, limit: int, lease: timedelta, wanted: Any) -> Any:
        """Claim what is due and free."""
        keys = self.due(limit, wanted)
        found = self.timers.claim(limit=limit, lease=lease, names=wanted)
        assert [(claim.timer.workflow_id, claim.timer.timer_id) for claim in found] == keys
        for key, claim in zip(keys, found, strict=True):
            row = self.rows[key]
            row.attempts += 1
            row.claim, row.until = claim, self.now + lease
            assert (claim.timer.fire_at, claim.attempt) == (row.fire_at, row.attempts)
            assert claim.timer.fire_at <= self.now
        return multiple(*found)

    @rule(claim=claims)
    def complete(self, claim: Claim) -> None:
        """Settle a claim that may be lost."""
        row = self.alive(claim)
        settlement = self.timers.complete(claim)
        assert (settlement.done, settlement.lost) == (((claim,), ()) if row else ((), (claim,)))
        if row:
            del self.rows[claim.timer.workflow_id, claim.timer.timer_id]

    @rule(claim=claims, delta=st.none() | seconds)
    def release(self, claim: Claim, delta: timedelta | None) -> None:
        """Give back a claim that may be lost."""
        row = self.alive(claim)
        retry_at = None if delta is None else self.now + delta
        settlement = self.timers.release(claim, retry_at=retry_at)
        assert (settlement.done, settlement.lost) == (((claim,), ()) if row else ((), (claim,)))
        if row:
            row.claim = None
            row.fire_at = retry_at or row.fire_at

    @rule(claim=claims, lease=leases)
    def extend(self, claim: Claim, lease: timedelta) -> None:
        """Hold for longer what may be lost."""
        row = self.alive(claim)
        settlement = self.timers.extend(claim, lease=lease)
        assert (settlement.done, settlement.lost) == (((claim,), ()) if row else ((), (claim,)))
        if row:
            row.until = self.now + lease

    @rule(claim=claims)
    def confirm(self, claim: Claim) -> None:
        """Ask whether a claim is alive."""
        if self.alive(claim):
            self.timers.confirm(claim)
        else:
            with pytest.raises(LeaseLost):
                self.timers.confirm(claim)

    @invariant()
    def the_table_is_as_the_model_says(self) -> None:
        """The same timers, and the same moment at which one can be claimed."""
        found = self.timers.expired(datetime.max.replace(tzinfo=UTC))
        assert found == sorted(TimerEntry(*key, row.fire_at) for key, row in self.rows.items())
        waits = [
            max(row.fire_at, row.until) - self.now if row.claim is not None else row.fire_at - self.now
            for row in self.rows.values()
        ]
        assert self.timers.next_wake() == min(waits, default=None)


def matches(timer_id: TimerId, wanted: list[str] | None) -> bool:
    if wanted is None:
        return True
    value = timer_id.value
    return isinstance(value, str) and any(
        value.startswith(name[:-1]) if name.endswith("*") else value == name for name in wanted
    )


@pytest.mark.parametrize("backend", ["libsql", "sqlite", "psycopg"], indirect=True)
def test_claims_do_what_the_model_does(store: Store) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call] # Hypothesis' own
        type("BoundMachine", (Machine,), {"store": store}),
        settings=settings(
            max_examples=40,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        ),
    )
