"""Whatever is scheduled in whatever order, the table holds what a dictionary would."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, get_args
from uuid import UUID

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aion_timers import TimerEntry, TimerId
from aion_timers.statements import IfExists
from tests.store import Store

NOW = datetime(2026, 6, 3, 2, 30, tzinfo=UTC)
LATEST = datetime.max.replace(tzinfo=UTC)

# one database serves all examples of a test: each example empties the table first
examples = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

policies = st.sampled_from(get_args(IfExists))
few_entries = st.builds(
    TimerEntry,
    st.sampled_from([UUID(int=0), UUID(int=1), UUID(int=2**127)]),
    st.sampled_from(["a", "a!", "b", 2, 10]),
    st.integers(-3, 3).map(lambda seconds: NOW + timedelta(seconds=seconds)),
)
any_id = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40) | st.integers(0, 2**64 - 1)
any_entries = st.builds(TimerEntry, st.uuids(), any_id, st.datetimes(timezones=st.just(UTC)))

Model = dict[tuple[UUID, TimerId], datetime]


def apply(model: Model, entry: TimerEntry, if_exists: str) -> bool:
    key = (entry.workflow_id, entry.timer_id)
    old = model.get(key)
    moves = {"replace": True, "keep": False}.get(if_exists)
    if old is None or (
        moves if moves is not None else (entry.fire_at < old) == (if_exists == "earliest") and entry.fire_at != old
    ):
        model[key] = entry.fire_at
        return True
    return False


def contents(timers: Any) -> Model:
    return {(entry.workflow_id, entry.timer_id): entry.fire_at for entry in timers.expired(LATEST)}


@examples
@given(st.lists(st.tuples(few_entries, policies), max_size=20))
def test_schedule_does_what_a_dictionary_does(store: Store, steps: list[tuple[TimerEntry, str]]) -> None:
    model: Model = {}
    store.sql("DELETE FROM timers")
    with store.timers() as timers:
        for entry, if_exists in steps:
            changed = timers.schedule(entry.workflow_id, entry.timer_id, entry.fire_at, if_exists=if_exists)
            assert changed is apply(model, entry, if_exists)
        assert contents(timers) == model


@examples
@given(st.lists(few_entries, max_size=10), st.lists(few_entries, max_size=30), policies)
def test_schedule_many_is_its_entries_one_by_one(
    store: Store, before: list[TimerEntry], entries: list[TimerEntry], if_exists: Any
) -> None:
    model: Model = {}
    store.sql("DELETE FROM timers")
    with store.timers() as timers:
        timers.schedule_many(before)
        for entry in before:
            apply(model, entry, "replace")
        changed = timers.schedule_many(entries, if_exists=if_exists)
        moved = {(entry.workflow_id, entry.timer_id) for entry in entries if apply(model, entry, if_exists)}
        assert contents(timers) == model
        assert changed == len(moved)


def test_equal_keys_on_both_sides_of_a_chunk_border_are_one_timer(store: Store) -> None:
    entries = [TimerEntry(UUID(int=0), number % 700, NOW + timedelta(seconds=number)) for number in range(2100)]
    for if_exists in get_args(IfExists):
        model: Model = {}
        store.sql("DELETE FROM timers")
        with store.timers() as timers:
            timers.schedule_many(entries, if_exists=if_exists)
            for entry in entries:
                apply(model, entry, if_exists)
            assert contents(timers) == model


@examples
@given(st.lists(any_entries, max_size=20))
def test_the_order_is_pythons_and_nothing_is_early(store: Store, entries: list[TimerEntry]) -> None:
    store.sql("DELETE FROM timers")
    expected = sorted({(entry.workflow_id, entry.timer_id): entry for entry in entries}.values())
    middle = expected[len(expected) // 2].fire_at if expected else NOW
    with store.timers() as timers:
        timers.schedule_many(entries)
        assert timers.expired(LATEST) == expected
        due = [entry for entry in expected if entry.fire_at <= middle]
        assert timers.expired(middle) == due
        assert timers.next_fire_at() == (expected[0].fire_at if expected else None)
        pages: list[TimerEntry] = []
        while page := timers.expired(middle, limit=3, after=pages[-1] if pages else None):
            pages += page
        assert pages == due
        assert timers.take(middle, limit=len(entries) + 1) == due
        assert timers.expired(LATEST) == expected[len(due) :]
