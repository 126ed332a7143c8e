"""A user's program that touches every public name: type checkers pass over it, and a test runs it.

``assert_type`` pins what a checker makes of each return value.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import assert_type
from uuid import UUID, uuid4

from sqlalchemy import Connection, Engine, Table, create_engine, exists, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, foreign, mapped_column, relationship, sessionmaker

from aion_timers import (
    AsyncDelivery,
    AsyncDispatcher,
    AsyncTimerRepository,
    Backoff,
    Claim,
    Delivery,
    Dispatcher,
    DowngradeRefusedError,
    ForeignRowError,
    IfExists,
    InvalidInputError,
    LeaseLost,
    MigrationError,
    NotMigratedError,
    PoolExhaustedError,
    Settlement,
    StoreUnavailableError,
    Timer,
    TimerEntry,
    TimerId,
    TimerRepository,
    TimerStoreError,
    UnsafeEngineError,
    UnsupportedBindError,
    doctor,
    libsql,
    migrate,
    prepare_sqlite,
)
from aion_timers.testing import FakeClock, Fired, NoProgressError, run_due

NOW = datetime.now(UTC)
LEASE = timedelta(seconds=30)
LATEST: IfExists = "latest"


class Base(DeclarativeBase):
    """The program's own base."""


class Order(Base):
    """A row that timers belong to."""

    __tablename__ = "orders"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    timers: Mapped[list[Timer]] = relationship(
        Timer, primaryjoin=lambda: foreign(Timer.workflow_id) == Order.id, viewonly=True
    )


# -- engines and migrations -------------------------------------------------------------------------------------------


def engines(folder: Path) -> tuple[Engine, AsyncEngine]:
    """A sync engine and an async one, on two files."""
    libsql.register()
    engine = create_engine(f"sqlite+libsql:///{folder / 'sync.db'}")
    assert_type(libsql.is_sound(engine.dialect), bool)
    plain = create_async_engine(f"sqlite+aiosqlite:///{folder / 'async.db'}")
    prepare_sqlite(plain)
    return engine, plain


def migrate_up(bind: Connection | Engine) -> None:
    """All that is to be done when the program starts."""
    try:
        migrate.check(bind)
    except NotMigratedError as error:
        assert_type(error.cure, str)
        migrate.upgrade(bind, "head")
    assert_type(migrate.current(bind), str | None)


def migrate_down(engine: Engine) -> None:
    """The way back, which timers are not lost on."""
    try:
        migrate.downgrade(engine)
    except DowngradeRefusedError as error:
        assert_type(error.cure, str)
        migrate.downgrade(engine, "base", force=True)
    except MigrationError as error:
        sys.exit(str(error))


def is_for_alembic(item: Table) -> bool:
    """What an env.py asks."""
    return migrate.include_object(item, item.name, "table", reflected=True, compare_to=None)


def lock(engine: Engine) -> None:
    """What an env.py runs in."""
    with engine.connect() as connection, migrate.locked(connection):
        connection.exec_driver_sql("SELECT 1")


def write_sql() -> str:
    """For another tool."""
    return migrate.offline("postgresql", "head", schema="shop")


def look_for_trouble(engine: Engine) -> list[str]:
    """What an operator is told."""
    findings = doctor.examine(engine, doctor.Limits(overdue=timedelta(hours=1)))
    assert_type(findings, list[doctor.Finding])
    return [f"{finding.name}: {finding.found}" for finding in findings if finding.status != "ok"]


# -- timers -----------------------------------------------------------------------------------------------------------


def write_and_read(session: Session, workflow_id: UUID) -> None:
    """Every method of the repository."""
    timers = TimerRepository(session, clock=lambda: NOW, notify=False)
    assert_type(timers.schedule(workflow_id, "reminder", NOW, if_exists=LATEST), bool)
    entry = TimerEntry(workflow_id, TimerId.named("other"), NOW + LEASE)
    assert_type(timers.schedule_many([entry, TimerEntry(workflow_id, TimerId.anonymous(7), NOW)]), int)
    assert_type(timers.get(workflow_id, TimerId.of("reminder")), TimerEntry | None)
    assert_type(timers.list_workflow(workflow_id), list[TimerEntry])
    assert_type(timers.expired(NOW, limit=10, after=None), list[TimerEntry])
    assert_type(timers.next_fire_at(), datetime | None)
    assert_type(timers.next_wake(["reminder"]), timedelta | None)
    assert_type(timers.now(), datetime)
    assert_type(timers.adopted(), bool)
    claims = timers.claim(limit=2, lease=LEASE)
    assert_type(claims, list[Claim])
    settle(timers, claims)
    assert_type(timers.take(NOW, limit=10, names=["reminder", "o*"]), list[TimerEntry])
    assert_type(timers.cancel(workflow_id, 7), bool)
    assert_type(timers.cancel_workflow(workflow_id), int)


def settle(timers: TimerRepository, claims: list[Claim]) -> None:
    """What becomes of claims."""
    assert_type(timers.extend(*claims, lease=LEASE), Settlement)
    for claim in claims:
        try:
            timers.confirm(claim)
        except LeaseLost as error:
            print(error.claim)
    released = timers.release(*claims[:1], retry_at=NOW)
    assert_type(released, Settlement)
    assert_type(timers.complete(*claims[1:]), Settlement)


async def write_and_read_async(session: AsyncSession, workflow_id: UUID) -> None:
    """The same, with ``await``."""
    timers = AsyncTimerRepository(session, clock=lambda: NOW, notify=False)
    assert_type(await timers.schedule(workflow_id, "reminder", NOW, if_exists="keep"), bool)
    assert_type(await timers.schedule_many(TimerEntry(workflow_id, number, NOW) for number in range(3)), int)
    assert_type(await timers.get(workflow_id, 1), TimerEntry | None)
    assert_type(await timers.list_workflow(workflow_id), list[TimerEntry])
    assert_type(await timers.expired(NOW, limit=10), list[TimerEntry])
    assert_type(await timers.next_fire_at(), datetime | None)
    assert_type(await timers.next_wake(), timedelta | None)
    assert_type(await timers.now(), datetime)
    assert_type(await timers.adopted(), bool)
    claims = await timers.claim(limit=2, lease=LEASE)
    assert_type(claims, list[Claim])
    assert_type(await timers.extend(*claims, lease=LEASE), Settlement)
    await timers.confirm(claims[0])
    assert_type(await timers.release(*claims[:1]), Settlement)
    assert_type(await timers.complete(*claims[1:]), Settlement)
    assert_type(await timers.take(NOW, limit=10), list[TimerEntry])
    assert_type(await timers.cancel(workflow_id, 1), bool)
    assert_type(await timers.cancel_workflow(workflow_id), int)


def join(session: Session) -> None:
    """The model in queries of one's own."""
    rows = session.execute(select(Order.id, Timer.fire_at).join(Timer, Timer.workflow_id == Order.id)).all()
    for order_id, fire_at in rows:
        assert_type(order_id, UUID)
        assert_type(fire_at, datetime)
    for timer in session.scalars(select(Timer).where(Timer.fire_at <= NOW, Timer.timer_id == TimerId.named("a"))):
        assert_type(timer.timer_id, TimerId)
        assert_type(timer.timer_id.value, str | int)
        assert_type(timer.timer_id.is_named, bool)
    for order in session.scalars(select(Order).where(~exists().where(Timer.workflow_id == Order.id))):
        assert_type(order.timers, list[Timer])


# -- dispatchers ------------------------------------------------------------------------------------------------------


def remind(delivery: Delivery) -> None:
    """A handler."""
    assert_type(delivery.timer, TimerEntry)
    assert_type(delivery.attempt, int)
    assert_type(delivery.late_by, timedelta)
    if not delivery.lost:
        delivery.extend()
    with delivery.transaction() as session:
        TimerRepository(session).schedule(delivery.timer.workflow_id, "second-reminder", NOW + timedelta(days=3))


async def remind_async(delivery: AsyncDelivery) -> None:
    """An async handler."""
    assert_type(delivery.timer.workflow_id, UUID)
    await delivery.extend()
    async with delivery.transaction() as session:
        await AsyncTimerRepository(session).cancel(delivery.timer.workflow_id, "second-reminder")


def dispatch(engine: Engine) -> None:
    """A dispatcher of threads."""
    dispatcher = Dispatcher(sessionmaker(engine), {"reminder": remind, "retry-*": remind}, retry=Backoff(), lease=LEASE)
    assert_type(dispatcher.run_due(), int)
    dispatcher.stop()
    dispatcher.run()


async def dispatch_async(engine: AsyncEngine) -> None:
    """A dispatcher of tasks."""
    dispatcher = AsyncDispatcher(async_sessionmaker(engine), remind_async, concurrency=1)
    assert_type(await dispatcher.run_due(), int)
    dispatcher.stop()
    await dispatcher.run()


def note(delivery: Delivery) -> None:
    """A handler that only tells."""
    print(delivery.timer.timer_id)


def step(engine: Engine) -> None:
    """What a test does: the days pass at once."""
    clock = FakeClock(NOW)
    dispatcher = Dispatcher(engine, note, clock=clock)
    try:
        fired = run_due(dispatcher, until=clock.now() + timedelta(days=4))
    except NoProgressError as error:
        sys.exit(error.cure)
    assert_type(fired, list[Fired])


# -- errors -----------------------------------------------------------------------------------------------------------


def explain(error: TimerStoreError) -> str:
    """What went wrong, and what to do about it."""
    match error:
        case InvalidInputError():
            return f"{error.argument}: {error.cure}"
        case ForeignRowError():
            return f"{error.row}: {error.cure}"
        case UnsafeEngineError() | UnsupportedBindError() | PoolExhaustedError() | StoreUnavailableError():
            return error.cure
        case _:
            return str(error)


def explain_driver(error: libsql.Error | libsql.Warning) -> str:
    """What the libSQL driver reports, as PEP 249 names it."""
    match error:
        case libsql.SnapshotError() | libsql.BusyError():
            return "run the transaction again"
        case libsql.DisconnectError() | libsql.ClosedError():
            return "connect again"
        case (
            libsql.OutcomeUnknownError()
            | libsql.OperationalError()
            | libsql.IntegrityError()
            | libsql.DataError()
            | libsql.InternalError()
        ):
            return f"look at the data: {error.code}"
        case libsql.ProgrammingError() | libsql.NotSupportedError() | libsql.InterfaceError():
            return "look at the program"
        case libsql.DatabaseError():
            return "look at the file"
        case _:
            return "none of the others"


# -- all of it --------------------------------------------------------------------------------------------------------


async def main(folder: Path) -> None:
    """Run everything on files in a folder."""
    engine, async_engine = engines(folder)
    migrate_up(engine)
    lock(engine)
    print(is_for_alembic(Base.metadata.tables["orders"]))
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        write_and_read(session, uuid4())
        join(session)
        TimerRepository(session).schedule(uuid4(), "reminder", NOW)
    dispatch(engine)
    step(engine)
    print(look_for_trouble(engine), len(write_sql()))
    try:
        TimerId.named("")
    except TimerStoreError as error:
        print(explain(error))
    print(explain_driver(libsql.BusyError("busy")))
    migrate_down(engine)
    engine.dispose()

    async with async_engine.begin() as connection:
        await connection.run_sync(migrate_up)
    async with AsyncSession(async_engine) as async_session, async_session.begin():
        await write_and_read_async(async_session, uuid4())
        await AsyncTimerRepository(async_session).schedule(uuid4(), "reminder", NOW)
    await dispatch_async(async_engine)
    await async_engine.dispose()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
