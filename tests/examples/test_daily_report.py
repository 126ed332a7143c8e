from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session, sessionmaker

from aion_timers import Dispatcher, TimerRepository
from aion_timers.testing import FakeClock, run_due
from examples.daily_report import NAME, Base, DailyReports, Reader, Report

DAY = timedelta(days=1)


@pytest.fixture(params=["libsql", "postgres"])
def engine(request: pytest.FixtureRequest) -> Engine:
    engine: Engine = request.getfixturevalue(f"timers_{request.param}_engine")
    Base.metadata.create_all(engine)
    return engine


def subscribe(engine: Engine, reports: DailyReports, zone: str) -> UUID:
    reader_id = uuid4()
    with Session(engine) as session, session.begin():
        session.add(reader := Reader(id=reader_id, zone=zone))
        reports.subscribe(session, reader)
    return reader_id


def written(engine: Engine, reader_id: UUID) -> list[str]:
    with Session(engine) as session:
        return list(session.scalars(select(Report.written_at).filter_by(reader_id=reader_id).order_by(Report.day)))


def test_nine_stays_nine_when_the_clocks_change(engine: Engine, timers_clock: FakeClock) -> None:
    reports = DailyReports(timers_clock)
    dispatcher = Dispatcher(sessionmaker(engine), {NAME: reports.write}, clock=timers_clock)
    timers_clock.move_to(datetime(2026, 3, 27, 12, tzinfo=UTC))
    berlin, new_york = subscribe(engine, reports, "Europe/Berlin"), subscribe(engine, reports, "America/New_York")

    run_due(dispatcher, until=datetime(2026, 3, 30, 12, tzinfo=UTC))

    assert written(engine, berlin) == [
        "2026-03-28T09:00+01:00",
        "2026-03-29T09:00+02:00",
        "2026-03-30T09:00+02:00",
    ]
    assert written(engine, new_york) == [
        "2026-03-27T09:00-04:00",
        "2026-03-28T09:00-04:00",
        "2026-03-29T09:00-04:00",
    ]

    timers_clock.move_to(datetime(2026, 10, 24, 12, tzinfo=UTC))
    run_due(dispatcher, until=datetime(2026, 10, 26, 12, tzinfo=UTC))
    assert written(engine, berlin)[-2:] == ["2026-10-25T09:00+01:00", "2026-10-26T09:00+01:00"]


def test_days_that_nobody_worked_are_made_up_for_by_one_report(engine: Engine, timers_clock: FakeClock) -> None:
    reports = DailyReports(timers_clock)
    reader_id = subscribe(engine, reports, "Asia/Tokyo")
    timers_clock.advance(10 * DAY)

    run_due(Dispatcher(sessionmaker(engine), {NAME: reports.write}, clock=timers_clock))

    assert len(written(engine, reader_id)) == 1
    with Session(engine) as session:
        (timer,) = TimerRepository(session).list_workflow(reader_id)
    assert timers_clock.now() < timer.fire_at <= timers_clock.now() + DAY
