from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from aion_timers import Dispatcher, TimerRepository
from aion_timers.testing import FakeClock, run_due
from examples.trip import Base, Trip, Trips

HOUR = timedelta(hours=1)


@pytest.fixture(params=["libsql", "postgres"])
def engine(request: pytest.FixtureRequest) -> Engine:
    engine: Engine = request.getfixturevalue(f"timers_{request.param}_engine")
    Base.metadata.create_all(engine)
    return engine.execution_options(isolation_level="IMMEDIATE") if request.param == "libsql" else engine


@pytest.fixture
def trips(engine: Engine, timers_clock: FakeClock) -> Trips:
    return Trips(sessionmaker(engine), timers_clock)


@pytest.fixture
def dispatcher(engine: Engine, trips: Trips, timers_clock: FakeClock) -> Dispatcher:
    return Dispatcher(sessionmaker(engine), {"deadline-*": trips.call_off}, clock=timers_clock)


def stored(engine: Engine, trip_id: UUID) -> tuple[str, int, int]:
    """The state of a trip, its refunds, and how many timers it has."""
    with Session(engine) as session:
        trip = session.get_one(Trip, trip_id)
        return trip.state, trip.refunds, len(TimerRepository(session).list_workflow(trip_id))


def test_a_trip_whose_parts_are_confirmed_in_time_is_booked(
    engine: Engine, trips: Trips, dispatcher: Dispatcher, timers_clock: FakeClock
) -> None:
    trip_id = trips.begin()
    assert trips.confirm(trip_id, "flight") == "pending"
    assert run_due(dispatcher, until=timers_clock.now() + HOUR) == []
    assert trips.confirm(trip_id, "hotel") == "booked"

    assert run_due(dispatcher, until=timers_clock.now() + 24 * HOUR) == []
    assert stored(engine, trip_id) == ("booked", 0, 0)


def test_a_deadline_calls_off_the_whole_trip_once(
    engine: Engine, trips: Trips, dispatcher: Dispatcher, timers_clock: FakeClock
) -> None:
    trip_id = trips.begin()
    trips.confirm(trip_id, "hotel")

    fired = run_due(dispatcher, until=timers_clock.now() + 24 * HOUR)

    assert [one.timer.timer_id.value for one in fired] == ["deadline-flight"]
    assert stored(engine, trip_id) == ("called off", 1, 0)
    assert trips.confirm(trip_id, "flight") == "called off"
    assert stored(engine, trip_id) == ("called off", 1, 0)


def test_nothing_confirmed_means_nothing_refunded(
    engine: Engine, trips: Trips, dispatcher: Dispatcher, timers_clock: FakeClock
) -> None:
    trip_id = trips.begin()

    assert len(run_due(dispatcher, until=timers_clock.now() + 24 * HOUR)) == 1
    assert stored(engine, trip_id) == ("called off", 0, 0)


def test_a_confirmation_and_a_deadline_that_meet_do_not_wait_for_each_other_for_ever(
    engine: Engine, trips: Trips, dispatcher: Dispatcher, timers_clock: FakeClock
) -> None:
    trip_ids = [trips.begin() for _ in range(20)]
    timers_clock.advance(24 * HOUR)
    with ThreadPoolExecutor(1) as pool:
        states = pool.submit(lambda: [trips.confirm(trip_id, "hotel") for trip_id in trip_ids])
        fired = dispatcher.run_due()
        assert set(states.result()) <= {"pending", "called off"}
    assert 20 <= fired <= 40
    assert {(state, timers) for state, _, timers in (stored(engine, trip_id) for trip_id in trip_ids)} == {
        ("called off", 0)
    }
