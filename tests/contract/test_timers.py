"""What every operation does, on every backend."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import Update, event, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from aion_timers import InvalidInputError, Timer, TimerEntry, TimerId
from tests.store import Store

NOW = datetime(2026, 6, 3, 2, 30, tzinfo=UTC)
SECOND = timedelta(seconds=1)
ALPHA = UUID("00000000-0000-4000-8000-00000000000a")
BETA = UUID("00000000-0000-4000-8000-00000000000b")


def ids(entries: list[TimerEntry]) -> list[str | int]:
    return [entry.timer_id.value for entry in entries]


def test_a_scheduled_timer_is_read_back(store: Store) -> None:
    with store.timers() as timers:
        assert timers.schedule(ALPHA, "wake-up", NOW) is True
        assert timers.get(ALPHA, "wake-up") == TimerEntry(ALPHA, "wake-up", NOW)
    with store.timers() as timers:
        assert timers.get(ALPHA, TimerId.named("wake-up")) == TimerEntry(ALPHA, "wake-up", NOW)
        assert timers.get(ALPHA, "other") is None
        assert timers.get(BETA, "wake-up") is None


def test_a_replaced_timer_leaves_one_row_with_the_new_instant(store: Store) -> None:
    with store.timers() as timers:
        timers.schedule(ALPHA, "wake-up", NOW)
        assert timers.schedule(ALPHA, "wake-up", NOW - SECOND) is True
        assert timers.list_workflow(ALPHA) == [TimerEntry(ALPHA, "wake-up", NOW - SECOND)]


def test_a_timer_is_due_from_its_instant_on(store: Store) -> None:
    with store.timers() as timers:
        timers.schedule(ALPHA, "wake-up", NOW)
        assert timers.expired(NOW - timedelta(microseconds=1)) == []
        assert ids(timers.expired(NOW)) == ["wake-up"]
        assert timers.take(NOW - timedelta(microseconds=1), limit=1) == []
        assert ids(timers.take(NOW, limit=1)) == ["wake-up"]


@pytest.mark.parametrize(
    "zone", [timezone(timedelta(hours=5, minutes=30)), timezone(-timedelta(hours=12)), ZoneInfo("America/New_York")]
)
def test_instants_of_every_zone_are_kept_in_utc(store: Store, zone: Any) -> None:
    with store.timers() as timers:
        timers.schedule(ALPHA, "wake-up", NOW.astimezone(zone))
        found = timers.get(ALPHA, "wake-up").fire_at
    assert found == NOW
    assert found.tzinfo is UTC


def test_a_name_and_a_number_are_two_timers(store: Store) -> None:
    with store.timers() as timers:
        timers.schedule(ALPHA, "3", NOW)
        timers.schedule(ALPHA, 3, NOW + SECOND)
        assert timers.get(ALPHA, 3).fire_at == NOW + SECOND
        assert timers.cancel(ALPHA, TimerId.anonymous(3)) is True
        assert ids(timers.list_workflow(ALPHA)) == ["3"]


POLICIES = [
    ("replace", -1, True, -1),
    ("replace", 1, True, 1),
    ("keep", -1, False, 0),
    ("keep", 1, False, 0),
    ("earliest", -1, True, -1),
    ("earliest", 0, False, 0),
    ("earliest", 1, False, 0),
    ("latest", -1, False, 0),
    ("latest", 0, False, 0),
    ("latest", 1, True, 1),
]


@pytest.mark.parametrize(("if_exists", "new", "changed", "stands"), POLICIES)
def test_what_becomes_of_a_timer_that_exists(
    store: Store,
    if_exists: Any,
    new: int,
    changed: bool,
    stands: int,
) -> None:
    with store.timers() as timers:
        assert timers.schedule(ALPHA, "wake-up", NOW, if_exists=if_exists) is True
        assert timers.schedule(ALPHA, "wake-up", NOW + new * SECOND, if_exists=if_exists) is changed
        assert timers.get(ALPHA, "wake-up").fire_at == NOW + stands * SECOND
        entry = TimerEntry(BETA, "wake-up", NOW)
        assert timers.schedule_many([entry], if_exists=if_exists) == 1
        moved = TimerEntry(BETA, "wake-up", NOW + new * SECOND)
        assert timers.schedule_many([moved], if_exists=if_exists) == int(changed)
        assert timers.get(BETA, "wake-up").fire_at == NOW + stands * SECOND


@pytest.mark.parametrize("if_exists", ["replace", "keep", "earliest", "latest"])
def test_scheduling_is_one_statement_whatever_is_there(store: Store, if_exists: Any) -> None:
    seen: list[str] = []
    with store.timers() as timers:
        timers.schedule_many([TimerEntry(ALPHA, 1, NOW), TimerEntry(ALPHA, 2, NOW)])
        event.listen(store.sync_engine, "before_cursor_execute", lambda *arguments: seen.append(arguments[2]))
        timers.schedule(ALPHA, 1, NOW, if_exists=if_exists)
        assert len(seen) == 1
        timers.schedule_many([TimerEntry(ALPHA, number, NOW) for number in range(4)], if_exists=if_exists)
        assert len(seen) == 2


def test_many_timers_are_scheduled_at_once(store: Store) -> None:
    entries = [TimerEntry(uuid4(), number, NOW + number * SECOND) for number in range(2500)]
    with store.timers() as timers:
        assert timers.schedule_many(iter(entries)) == 2500
        assert timers.schedule_many([]) == 0
        assert timers.expired(NOW + 2500 * SECOND) == entries


def test_of_equal_keys_among_many_the_last_one_stands(store: Store) -> None:
    with store.timers() as timers:
        timers.schedule_many([TimerEntry(ALPHA, "a", NOW + number * SECOND) for number in (3, 1, 2)])
        assert timers.get(ALPHA, "a").fire_at == NOW + 2 * SECOND


def test_expired_comes_in_order_up_to_a_limit(store: Store) -> None:
    expected = [
        TimerEntry(BETA, "z", NOW - SECOND),
        TimerEntry(ALPHA, 10, NOW),
        TimerEntry(ALPHA, 2, NOW),
        TimerEntry(ALPHA, "a!", NOW),
        TimerEntry(ALPHA, "a", NOW),
        TimerEntry(BETA, 1, NOW),
    ]
    with store.timers() as timers:
        timers.schedule_many(reversed(expected))
        timers.schedule(ALPHA, "later", NOW + SECOND)
        assert timers.expired(NOW) == expected == sorted(expected)
        assert timers.expired(NOW, limit=2) == expected[:2]


def test_pages_give_each_timer_once(store: Store) -> None:
    entries = [TimerEntry(UUID(int=number % 3), number, NOW + (number // 4) * SECOND) for number in range(20)]
    with store.timers() as timers:
        timers.schedule_many(entries)
        found: list[TimerEntry] = []
        while page := timers.expired(NOW + 20 * SECOND, limit=3, after=found[-1] if found else None):
            found += page
        assert found == sorted(entries)


def test_the_database_tells_the_time_unless_a_clock_does(store: Store) -> None:
    now = datetime.now(UTC)
    with store.timers() as timers:
        timers.schedule(ALPHA, "past", now - timedelta(hours=1))
        timers.schedule(ALPHA, "future", now + timedelta(hours=1))
        assert ids(timers.expired()) == ["past"]
        assert ids(timers.take(limit=10)) == ["past"]
    with store.timers(clock=lambda: now + timedelta(hours=2)) as timers:
        assert ids(timers.expired()) == ["future"]
        assert timers.expired(now) == []
        assert ids(timers.take(limit=10)) == ["future"]


def test_a_timer_that_is_scheduled_for_now_is_due_soon_after(store: Store) -> None:
    with store.timers() as timers:
        timers.schedule(ALPHA, "now", datetime.now(UTC))
    for _ in range(500):
        with store.timers() as timers:
            if taken := timers.take(limit=1):
                break
    assert ids(taken) == ["now"]
    assert taken[0].fire_at <= datetime.now(UTC)


def test_next_fire_at_is_the_earliest_instant(store: Store) -> None:
    with store.timers() as timers:
        assert timers.next_fire_at() is None
        timers.schedule(ALPHA, "b", NOW)
        timers.schedule(BETA, "a", NOW - SECOND)
        assert timers.next_fire_at() == NOW - SECOND


def test_cancel_says_whether_there_was_a_timer(store: Store) -> None:
    with store.timers() as timers:
        timers.schedule(ALPHA, "a", NOW)
        timers.schedule(ALPHA, "b", NOW)
        assert timers.cancel(ALPHA, "a") is True
        assert timers.cancel(ALPHA, "a") is False
        assert ids(timers.list_workflow(ALPHA)) == ["b"]


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_host_may_have_rows_of_a_kind_of_its_own(store: Store) -> None:
    @event.listens_for(store.engine, "connect")
    def rows(connection: sqlite3.Connection, _: object) -> None:
        connection.row_factory = sqlite3.Row

    store.engine.dispose()
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, name, NOW) for name in ("a", "b", "c", "d"))
        claims = timers.claim(limit=1, lease=timedelta(minutes=1))
        assert timers.complete(*claims).done == tuple(claims)
        assert [timer.timer_id.value for timer in timers.take(limit=1)] == ["b"]
        assert timers.cancel_workflow(ALPHA) == 2


def test_cancel_workflow_says_how_many_there_were(store: Store) -> None:
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, number, NOW) for number in range(5))
        timers.schedule(BETA, "other", NOW)
        assert timers.cancel_workflow(ALPHA) == 5
        assert timers.cancel_workflow(ALPHA) == 0
        assert timers.expired(NOW) == [TimerEntry(BETA, "other", NOW)]


def test_list_workflow_is_in_order(store: Store) -> None:
    with store.timers() as timers:
        timers.schedule(ALPHA, "a", NOW + SECOND)
        timers.schedule(ALPHA, "c", NOW)
        timers.schedule(ALPHA, "b", NOW)
        timers.schedule(BETA, "other", NOW)
        assert ids(timers.list_workflow(ALPHA)) == ["b", "c", "a"]


def test_take_deletes_what_it_returns(store: Store) -> None:
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, number, NOW + number * SECOND) for number in range(5))
        assert ids(timers.take(NOW + 3 * SECOND, limit=2)) == [0, 1]
        assert ids(timers.take(NOW + 3 * SECOND, limit=10)) == [2, 3]
        assert timers.take(NOW + 3 * SECOND, limit=10) == []
        assert ids(timers.list_workflow(ALPHA)) == [4]


NAMED = ["pay", "payment", "retry-1", "retry-2", "re*", 'quo"te', "ünï", 7]


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["pay"], ["pay"]),
        (["pay*"], ["pay", "payment"]),
        (["retry-*", "pay"], ["pay", "retry-1", "retry-2"]),
        (["*"], ["pay", "payment", "re*", "retry-1", "retry-2", 'quo"te', "ünï"]),
        (["re**"], ["re*"]),
        (['quo"*', "ün*"], ['quo"te', "ünï"]),
        (["7"], []),
        (["PAY", "pa_", "pa%"], []),
        ([], []),
        (("pay", "pay", "pay*"), ["pay", "payment"]),
    ],
)
def test_take_of_some_names_leaves_the_others(store: Store, names: Any, taken: list[str]) -> None:
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, name, NOW) for name in NAMED)
        found = ids(timers.take(NOW, limit=100, names=names))
        assert sorted(found) == sorted(taken)
        assert len(timers.list_workflow(ALPHA)) == len(NAMED) - len(taken)


def test_take_of_a_name_finds_it_behind_others(store: Store) -> None:
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, f"other-{number}", NOW) for number in range(50))
        timers.schedule(ALPHA, "mine", NOW + SECOND)
        assert ids(timers.take(NOW + SECOND, limit=1, names=["mine"])) == ["mine"]


def test_nothing_is_committed_but_by_the_caller(store: Store) -> None:
    session = store.new_session()
    timers = store.repository(session)
    timers.schedule(ALPHA, "a", NOW)
    timers.schedule_many([TimerEntry(ALPHA, "b", NOW)])
    session.rollback()
    assert timers.list_workflow(ALPHA) == []
    timers.schedule(ALPHA, "a", NOW)
    session.commit()
    for undone in (
        lambda: timers.cancel(ALPHA, "a"),
        lambda: timers.cancel_workflow(ALPHA),
        lambda: timers.take(NOW, limit=1),
        lambda: timers.schedule(ALPHA, "a", NOW + SECOND),
    ):
        undone()
        session.rollback()
        assert timers.get(ALPHA, "a") == TimerEntry(ALPHA, "a", NOW)
    session.close()


def test_a_savepoint_that_is_rolled_back_leaves_nothing(store: Store) -> None:
    session = store.new_session()
    timers = store.repository(session)
    savepoint = store.blocking(session.begin_nested())
    timers.schedule(ALPHA, "inner", NOW)
    savepoint.rollback()
    timers.schedule(ALPHA, "outer", NOW)
    session.commit()
    assert ids(timers.list_workflow(ALPHA)) == ["outer"]
    savepoint = store.blocking(session.begin_nested())
    timers.schedule(ALPHA, "inner", NOW)
    savepoint.commit()
    session.rollback()
    assert ids(timers.list_workflow(ALPHA)) == ["outer"]
    session.close()


def test_a_connection_serves_as_a_session_does(store: Store) -> None:
    with store.connection() as connection:
        timers = store.repository(connection)
        timers.schedule(ALPHA, "a", NOW)
        timers.schedule_many([TimerEntry(ALPHA, "b", NOW)])
        assert ids(timers.expired(NOW)) == ["a", "b"]
        connection.rollback()
        assert timers.expired(NOW) == []
        timers.schedule(ALPHA, "a", NOW)
    with store.timers() as timers:
        assert ids(timers.expired(NOW)) == ["a"]


def test_an_autocommit_connection_commits_each_call(store: Store) -> None:
    with store.connection(isolation_level="AUTOCOMMIT") as connection:
        timers = store.repository(connection)
        timers.schedule_many(TimerEntry(ALPHA, number, NOW) for number in range(3))
        assert ids(timers.take(NOW, limit=2)) == [0, 1]
        connection.rollback()
    with store.timers() as timers:
        assert ids(timers.list_workflow(ALPHA)) == [2]


def test_a_scoped_session_serves(store: Store) -> None:
    if store.is_async:
        from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker  # noqa: PLC0415 - for the async backends alone

        registry: Any = async_scoped_session(async_sessionmaker(store.engine), scopefunc=lambda: 1)
    else:
        registry = scoped_session(sessionmaker(store.engine))
    timers = store.repository(registry)
    timers.schedule(ALPHA, "a", NOW)
    registry = store.blocking(registry)
    registry.commit()
    assert ids(timers.expired(NOW)) == ["a"]
    registry.remove()


def test_a_loaded_timer_is_expired_when_its_row_changes(store: Store) -> None:
    with store.session() as session:
        timers = store.repository(session)
        timers.schedule_many(TimerEntry(ALPHA, name, NOW) for name in ("moved", "many", "kept"))
        moved, many, kept = (session.get(Timer, (ALPHA, TimerId.named(name))) for name in ("moved", "many", "kept"))
        timers.schedule(ALPHA, "moved", NOW + SECOND)
        timers.schedule_many([TimerEntry(ALPHA, "many", NOW + SECOND)])
        raw = getattr(session, "wrapped", session)
        assert [timer in raw.identity_map.values() for timer in (moved, many, kept)] == [True] * 3
        assert [_expired(timer) for timer in (moved, many, kept)] == [True, True, False]
        session.refresh(moved)
        assert moved.fire_at == NOW + SECOND
        session.refresh(many)
        timers.cancel(ALPHA, "moved")
        timers.take(NOW, limit=1, names=["kept"])
        assert [_expired(timer) for timer in (moved, many, kept)] == [True, False, True]
        timers.cancel_workflow(ALPHA)
        assert _expired(many)


def _expired(timer: Timer) -> bool:
    from sqlalchemy import inspect  # noqa: PLC0415 - of an instance, not of the standard library

    return bool(inspect(timer).expired)


def test_the_model_is_read_and_joined(store: Store) -> None:
    with store.session() as session:
        store.repository(session).schedule(ALPHA, "a", NOW)
        (timer,) = session.scalars(select(Timer).where(Timer.fire_at <= NOW, Timer.timer_id == "a")).all()
        assert (timer.workflow_id, timer.timer_id, timer.fire_at) == (ALPHA, TimerId.named("a"), NOW)
        assert session.scalar(select(Timer.fire_at).where(Timer.workflow_id == ALPHA)) == NOW
        assert session.scalars(select(Timer).where(Timer.fire_at > NOW)).all() == []


def test_what_is_at_the_ends_of_the_range_is_read_right(store: Store) -> None:
    first = datetime(1, 1, 1, tzinfo=UTC)
    last = datetime.max.replace(tzinfo=UTC)
    with store.timers() as timers:
        timers.schedule(ALPHA, "first", first)
        timers.schedule(ALPHA, "last", last)
        assert [entry.fire_at for entry in timers.list_workflow(ALPHA)] == [first, last]
        assert timers.next_fire_at() == first
        assert ids(timers.expired(first)) == ["first"]
        assert ids(timers.take(last, limit=2)) == ["first", "last"]


def test_every_character_of_a_name_comes_back(store: Store) -> None:
    names = [chr(code) * 2 for code in (*range(0x20), 0x22, 0x5C, 0x7F, 0x80, 0x2028, 0xD7FF, 0xE000, 0xFFFF, 0x10FFFF)]
    names += ["café", "cafe\u0301", '{"Named":"x"}', "%s %(x)s :x ?", " ", "a" * 1010]
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, name, NOW) for name in names)
        for name in names:
            timers.schedule(BETA, name, NOW)
        assert (
            ids(timers.list_workflow(ALPHA))
            == ids(timers.list_workflow(BETA))
            == ids(sorted(TimerEntry(ALPHA, name, NOW) for name in names))
        )
        assert all(timers.get(ALPHA, name).timer_id.value == name for name in names)
        assert sorted(
            ids(timers.take(NOW, limit=1000, names=[name for name in names if not name.endswith("*")]))
        ) == sorted(names * 2)


def test_anonymous_ids_go_up_to_64_bits(store: Store) -> None:
    numbers = [0, 1, 2**31, 2**53 + 1, 2**63, 2**64 - 1]
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, number, NOW) for number in numbers)
        assert sorted(ids(timers.take(NOW, limit=10))) == numbers


class Exact(datetime):
    """A datetime that is finer than a microsecond, as libraries for nanoseconds have it."""

    nanosecond = 500


def test_an_as_of_between_two_microseconds_takes_nothing_early(store: Store) -> None:
    as_of = Exact(2026, 6, 3, 2, 30, tzinfo=UTC)
    with store.timers() as timers:
        timers.schedule(ALPHA, "later", NOW + timedelta(microseconds=1))
        timers.schedule(ALPHA, "now", NOW)
        assert ids(timers.expired(as_of)) == ["now"]
        assert ids(timers.take(as_of, limit=10)) == ["now"]
    with store.timers(clock=lambda: as_of) as timers:
        assert timers.expired() == []


def test_a_refused_entry_of_a_collection_keeps_all_of_it_out(store: Store) -> None:
    entries: list[Any] = [TimerEntry(ALPHA, number, NOW) for number in range(1500)]
    entries.append(None)
    with store.timers() as timers, pytest.raises(InvalidInputError):
        timers.schedule_many(entries)
    with store.timers() as timers:
        assert timers.list_workflow(ALPHA) == []


def test_a_generator_is_written_as_it_goes(store: Store) -> None:
    inserts: list[str] = []
    written: list[int] = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        inserts.extend([statement] if "INSERT INTO" in statement else [])

    def entries() -> Iterator[TimerEntry]:
        for number in range(3000):
            if number % 1000 == 0:
                written.append(len(inserts))
            yield TimerEntry(ALPHA, number, NOW)

    event.listen(store.sync_engine, "before_cursor_execute", note)
    with store.timers() as timers:
        timers.schedule_many(entries())
        assert len(timers.list_workflow(ALPHA)) == 3000
    assert written == [0, 1, 2]


def test_an_error_of_what_gives_the_entries_is_the_hosts_own(store: Store) -> None:
    def entries() -> Iterator[TimerEntry]:
        yield TimerEntry(ALPHA, "a", NOW)
        raise OperationalError("SELECT", {}, Exception("no such table: orders"))

    session = store.new_session()
    with pytest.raises(OperationalError, match="orders"):
        store.repository(session).schedule_many(entries())
    session.close()


def test_a_session_that_sends_reads_elsewhere_is_told_of_a_write(store: Store) -> None:
    asked: list[Any] = []

    class Routing(Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, **options: Any) -> Any:
            asked.append(clause)
            return super().get_bind(mapper, clause=clause, **options)

    session = store.new_session(sync_session_class=Routing) if store.is_async else Routing(store.engine)
    timers = store.repository(session)
    for call in (
        lambda: timers.schedule(ALPHA, "a", NOW),
        lambda: timers.cancel(ALPHA, "a"),
        lambda: timers.take(NOW, limit=1),
        lambda: timers.schedule_many([TimerEntry(ALPHA, "a", NOW)]),
        lambda: timers.cancel_workflow(ALPHA),
    ):
        asked.clear()
        call()
        assert isinstance(asked[0], Update)
        session.rollback()
    asked.clear()
    timers.expired(NOW)
    assert not isinstance(asked[0], Update)
    session.close()


def test_a_timer_made_with_a_plain_name_is_found_by_it(store: Store) -> None:
    with store.session() as session:
        timer = Timer(workflow_id=ALPHA, timer_id="plain", fire_at=NOW)
        session.add(timer)
        session.flush()
        store.repository(session).schedule(ALPHA, "plain", NOW + SECOND)
        assert _expired(timer)
        assert "..." in repr(timer)
        session.refresh(timer)
        assert timer.fire_at == NOW + SECOND


def test_many_names_and_prefixes_find_theirs(store: Store) -> None:
    wanted = [f"kind-{number}-" for number in range(0, 300, 3)]
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, f"kind-{number}-x", NOW) for number in range(300))
        assert len(timers.take(NOW, limit=1000, names=[f"{name}*" for name in wanted])) == 100
        assert len(timers.take(NOW, limit=1000, names=[f"kind-{number}-x" for number in range(300)])) == 200
