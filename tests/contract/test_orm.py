"""What a host expects of SQLAlchemy's ORM: relationships, events, expiry, several databases, sessions of requests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, Uuid, event, func, inspect, make_url, select
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncAttrs, AsyncSession, async_sessionmaker
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    foreign,
    immediateload,
    joinedload,
    lazyload,
    mapped_column,
    relationship,
    selectinload,
    sessionmaker,
    subqueryload,
    with_parent,
)

from aion_timers import AsyncTimerRepository, Timer, TimerEntry, TimerRepository
from tests.conftest import Databases, open_engine
from tests.store import Store

NOW = datetime(2026, 6, 3, 2, 30, tzinfo=UTC)
DAY = timedelta(days=1)


class Base(AsyncAttrs, DeclarativeBase):
    """The host's own base."""


class Order(Base):
    """A host's table whose key is a workflow id, stored as SQLAlchemy likes to on each database."""

    __tablename__ = "orders"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    customer: Mapped[str]
    timers: Mapped[list[Timer]] = relationship(
        Timer,
        primaryjoin=lambda: foreign(Timer.workflow_id) == Order.id,
        order_by=lambda: (Timer.fire_at, Timer.timer_id),
        viewonly=True,
    )


class Parcel(Base):
    """Another, whose key is 32 digits on every database."""

    __tablename__ = "parcels"

    id: Mapped[UUID] = mapped_column(Uuid(native_uuid=False), primary_key=True)
    timers: Mapped[list[Timer]] = relationship(
        Timer, primaryjoin=lambda: foreign(Timer.workflow_id) == Parcel.id, viewonly=True
    )


def run(store: Store, connection: Any, work: Callable[..., Any]) -> None:
    """Call a function with the sync connection."""
    if store.is_async:
        connection.run_sync(work)
    else:
        work(connection)


@pytest.fixture
def shop(store: Store) -> Iterator[tuple[Store, dict[str, UUID]]]:
    """Three orders, of which the first two have timers."""
    ids = {name: uuid4() for name in ("ann", "bob", "cyd")}
    with store.connection() as connection:
        run(store, connection, Base.metadata.create_all)
    with store.session() as session:
        session.add_all([Order(id=order_id, customer=name) for name, order_id in ids.items()])
        timers = store.repository(session)
        timers.schedule(ids["ann"], "remind", NOW)
        timers.schedule(ids["bob"], "remind", NOW + DAY)
        timers.schedule(ids["bob"], 7, NOW)
    yield store, ids
    with store.connection() as connection:
        run(store, connection, Base.metadata.drop_all)


Shop = tuple[Store, dict[str, UUID]]


def names(timers: list[Timer]) -> list[str | int]:
    return [timer.timer_id.value for timer in timers]


# -- relationships ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [immediateload, selectinload, joinedload, subqueryload])
def test_an_order_comes_with_its_timers(shop: Shop, load: Any) -> None:
    store, _ = shop
    with store.session() as session:
        statement = select(Order).options(load(Order.timers)).order_by(Order.customer)
        orders = session.scalars(statement).unique().all()
        assert [(order.customer, names(order.timers)) for order in orders] == [
            ("ann", ["remind"]),
            ("bob", [7, "remind"]),
            ("cyd", []),
        ]
        assert [timer.fire_at for timer in orders[1].timers] == [NOW, NOW + DAY]
        assert {timer.workflow_id for timer in orders[1].timers} == {orders[1].id}


def test_timers_are_loaded_when_they_are_asked_for(shop: Shop) -> None:
    store, ids = shop
    with store.session() as session:
        bob = session.get(Order, ids["bob"], options=[lazyload(Order.timers)])
        timers = store.runner.run(_awaited(bob.awaitable_attrs.timers)) if store.is_async else bob.timers
        assert names(timers) == [7, "remind"]


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def test_a_relationship_serves_in_joins_and_conditions(shop: Shop) -> None:
    store, ids = shop
    other = aliased(Timer)
    with store.session() as session:

        def found(statement: Any) -> list[Any]:
            return sorted(session.scalars(statement).all())

        assert found(select(Order.customer).join(Order.timers)) == ["ann", "bob", "bob"]
        assert found(select(Order.customer).join(Order.timers.of_type(other)).where(other.timer_id == 7)) == ["bob"]
        assert found(select(Order.customer).join(Order.timers.and_(Timer.fire_at > NOW))) == ["bob"]
        assert found(select(Order.customer).where(Order.timers.any())) == ["ann", "bob"]
        assert found(select(Order.customer).where(~Order.timers.any(Timer.fire_at <= NOW))) == ["cyd"]
        counted = select(func.count(Timer.timer_id)).where(Timer.workflow_id == Order.id).scalar_subquery()
        assert found(select(counted).select_from(Order)) == [0, 1, 2]
        bob = session.get(Order, ids["bob"])
        assert names(session.scalars(select(Timer).where(with_parent(bob, Order.timers))).all()) in (
            [7, "remind"],
            ["remind", 7],
        )


def test_a_key_that_the_host_stores_in_another_form(shop: Shop) -> None:
    store, _ = shop
    parcel_id, other_id = uuid4(), uuid4()
    with store.session() as session:
        session.add_all([Parcel(id=parcel_id), Parcel(id=other_id)])
        session.flush()
        store.repository(session).schedule(parcel_id, "deliver", NOW)
    with store.session() as session:
        assert session.scalars(select(Parcel.id).join(Timer, Timer.workflow_id == Parcel.id)).all() == [parcel_id]
        assert session.scalars(select(Parcel.id).where(~Parcel.timers.any())).all() == [other_id]
        parcels = session.scalars(select(Parcel).options(selectinload(Parcel.timers)).order_by(Parcel.timers.any()))
        assert [names(parcel.timers) for parcel in parcels] == [[], ["deliver"]]
        inside = select(Timer.timer_id).where(Timer.workflow_id.in_(select(Parcel.id)))
        assert [timer_id.value for timer_id in session.scalars(inside)] == ["deliver"]


def test_a_relationship_writes_nothing(shop: Shop) -> None:
    store, ids = shop
    with store.session() as session:
        bob = session.get(Order, ids["bob"], options=[selectinload(Order.timers)])
        bob.timers.clear()
        session.delete(bob)
    with store.timers() as timers:
        assert len(timers.list_workflow(ids["bob"])) == 2
        assert timers.cancel_workflow(ids["bob"]) == 2


def test_a_collection_is_as_it_was_until_it_is_refreshed(shop: Shop) -> None:
    store, ids = shop
    with store.session() as session:
        ann = session.get(Order, ids["ann"], options=[selectinload(Order.timers)])
        store.repository(session).schedule(ids["ann"], "thank", NOW + DAY)
        assert names(ann.timers) == ["remind"]
        session.refresh(ann, ["timers"])
        assert names(ann.timers) == ["remind", "thank"]


# -- what a session keeps ---------------------------------------------------------------------------------------------


def test_what_was_taken_outlives_the_commit(shop: Shop) -> None:
    store, ids = shop
    session = store.new_session()
    loaded = session.get(Timer, (ids["ann"], "remind"))
    taken = store.repository(session).take(NOW, limit=1, names=["remind"])
    session.commit()
    assert taken == [TimerEntry(ids["ann"], "remind", NOW)]
    # an object is expired by the commit, and its row is gone
    with pytest.raises(InvalidRequestError, match="Could not refresh"):
        session.refresh(loaded)
    session.close()


def test_a_loaded_timer_stays_readable_where_nothing_is_expired(shop: Shop) -> None:
    store, ids = shop
    with store.session(expire_on_commit=False) as session:
        kept = session.get(Timer, (ids["ann"], "remind"))
        moved = session.get(Timer, (ids["bob"], "remind"))
        store.repository(session).schedule(ids["bob"], "remind", NOW)
        session.commit()
        assert kept.fire_at == NOW
        assert "fire_at" in inspect(moved).expired_attributes
        session.refresh(moved)
        assert moved.fire_at == NOW


def test_a_savepoint_that_is_rolled_back_takes_timers_and_orders_with_it(shop: Shop) -> None:
    store, ids = shop
    with store.session() as session:
        timers = store.repository(session)
        for fail in (True, False):
            savepoint = store.blocking(session.begin_nested())
            session.add(Order(id=uuid4(), customer="dan"))
            session.flush()
            timers.schedule(ids["cyd"], "inner", NOW)
            timers.schedule_many([TimerEntry(ids["cyd"], number, NOW) for number in range(3)])
            timers.schedule(ids["ann"], "remind", NOW + DAY)
            assert timers.cancel(ids["bob"], 7)
            if fail:
                savepoint.rollback()
                assert timers.list_workflow(ids["cyd"]) == []
                assert timers.get(ids["ann"], "remind") == TimerEntry(ids["ann"], "remind", NOW)
            else:
                savepoint.commit()
    with store.session() as session:
        timers = store.repository(session)
        assert len(timers.list_workflow(ids["cyd"])) == 4
        assert timers.get(ids["bob"], 7) is None
        assert session.scalar(select(func.count()).select_from(Order).where(Order.customer == "dan")) == 1


def test_a_savepoint_with_an_error_in_it_leaves_nothing(shop: Shop) -> None:
    store, ids = shop
    with store.session() as session:
        timers = store.repository(session)
        timers.schedule(ids["cyd"], "outer", NOW)
        savepoint = store.blocking(session.begin_nested())
        timers.schedule(ids["cyd"], "inner", NOW)
        session.add(Order(id=ids["ann"], customer="ann again"))
        with pytest.raises(Exception, match=r"(?i)unique|duplicate"):
            session.flush()
        savepoint.rollback()
    with store.timers() as timers:
        assert [entry.timer_id.value for entry in timers.list_workflow(ids["cyd"])] == ["outer"]


def test_a_commit_whose_flush_fails_takes_the_timers_with_it(shop: Shop) -> None:
    store, ids = shop
    session = store.new_session()
    store.repository(session).schedule(ids["cyd"], "remind", NOW)
    session.add(Order(id=ids["ann"], customer="ann again"))
    with pytest.raises(IntegrityError):
        session.commit()
    session.close()
    with store.timers() as timers:
        assert timers.list_workflow(ids["cyd"]) == []


# -- events -----------------------------------------------------------------------------------------------------------


def test_a_flush_schedules_a_timer_for_each_new_order(shop: Shop) -> None:
    store, _ = shop
    session = store.new_session()
    sync: Session = session.wrapped.sync_session if store.is_async else session

    @event.listens_for(sync, "after_flush")
    def remind(flushed: Session, _: object) -> None:
        new = [order.id for order in flushed.new if isinstance(order, Order)]
        TimerRepository(flushed).schedule_many(TimerEntry(order_id, "remind", NOW) for order_id in new)

    session.add(Order(id=(kept := uuid4()), customer="eve"))
    session.commit()
    session.add(Order(id=(undone := uuid4()), customer="fay"))
    session.flush()
    timers = store.repository(session)
    assert timers.get(undone, "remind") is not None
    session.rollback()
    assert timers.get(undone, "remind") is None
    assert timers.get(kept, "remind") == TimerEntry(kept, "remind", NOW)
    session.close()


def test_the_hosts_events_see_one_transaction(shop: Shop) -> None:
    store, _ = shop
    seen: list[str] = []
    with store.session() as session:
        sync = session.wrapped.sync_session if store.is_async else session
        for name in ("after_begin", "before_commit", "after_commit", "after_rollback"):
            event.listen(sync, name, lambda *_, name=name: seen.append(name))
        session.add(Order(id=(order_id := uuid4()), customer="dee"))
        timers = store.repository(session)
        timers.schedule(order_id, "first", NOW)
        timers.cancel(order_id, "first")
    assert seen == ["after_begin", "before_commit", "after_commit"]


def test_after_the_commit_it_is_too_late_to_schedule(shop: Shop) -> None:
    store, ids = shop
    session = store.new_session()
    sync: Session = session.wrapped.sync_session if store.is_async else session
    refused: list[Exception] = []

    @event.listens_for(sync, "after_commit", once=True)
    def too_late(committed: Session) -> None:
        try:
            TimerRepository(committed).schedule(ids["cyd"], "late", NOW)
        except InvalidRequestError as error:
            refused.append(error)

    store.repository(session).schedule(ids["cyd"], "in time", NOW)
    session.commit()
    assert len(refused) == 1
    assert [entry.timer_id.value for entry in store.repository(session).list_workflow(ids["cyd"])] == ["in time"]
    session.close()


# -- several databases ------------------------------------------------------------------------------------------------


def test_a_session_of_several_engines_writes_timers_to_theirs(shop: Shop, tmp_path: Any) -> None:
    store, ids = shop
    scheme = "sqlite+aiolibsql" if store.is_async else "sqlite+libsql"
    other: Any = open_engine(make_url(f"{scheme}:///{tmp_path / 'orders.db'}"))
    binds = {Base: other, Timer: store.engine}
    make: Any = AsyncSession if store.is_async else Session
    if store.is_async:
        store.runner.run(_create(other))
    else:
        Base.metadata.create_all(other)
    session = store.blocking(make(binds=binds))
    session.add(Order(id=(order_id := uuid4()), customer="gus"))
    timers = store.repository(session)
    timers.schedule(order_id, "remind", NOW)
    session.commit()
    assert session.scalars(select(Order.customer)).all() == ["gus"]
    assert timers.get(order_id, "remind") == TimerEntry(order_id, "remind", NOW)
    assert timers.get(ids["ann"], "remind") is not None
    session.add(Order(id=(undone := uuid4()), customer="hal"))
    session.flush()
    timers.schedule(undone, "remind", NOW)
    session.rollback()
    assert timers.get(undone, "remind") is None
    assert session.scalars(select(Order.customer)).all() == ["gus"]
    session.close()
    if store.is_async:
        store.runner.run(_awaited(other.dispose()))
    else:
        other.dispose()


async def _create(engine: Any) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)


# -- a session a request ----------------------------------------------------------------------------------------------


def test_a_session_a_request_commits_at_its_end(shop: Shop) -> None:
    store, ids = shop
    if store.is_async:
        store.runner.run(_requests(store, ids["cyd"]))
        return
    engine: Any = store.engine
    sessions = sessionmaker(engine)
    with sessions.begin() as session:
        TimerRepository(session).schedule(ids["cyd"], "kept", NOW)

    def fail() -> None:
        with sessions.begin() as session:
            TimerRepository(session).schedule(ids["cyd"], "undone", NOW)
            raise ConnectionError

    with pytest.raises(ConnectionError):
        fail()
    with sessions() as session:
        assert [entry.timer_id.value for entry in TimerRepository(session).list_workflow(ids["cyd"])] == ["kept"]


async def _requests(store: Store, workflow_id: UUID) -> None:
    engine: Any = store.engine
    sessions = async_sessionmaker(engine)

    async def dependency() -> AsyncIterator[AsyncSession]:
        async with sessions.begin() as session:
            yield session

    async def repository(session: AsyncSession) -> AsyncTimerRepository:
        return AsyncTimerRepository(session)

    request = asynccontextmanager(dependency)
    async with request() as session:
        timers = await repository(session)
        await timers.schedule(workflow_id, "kept", NOW)

    async def fail() -> None:
        async with request() as session:
            timers = await repository(session)
            await timers.schedule(workflow_id, "undone", NOW)
            raise ConnectionError

    with pytest.raises(ConnectionError):
        await fail()
    async with request() as session:
        found = await (await repository(session)).list_workflow(workflow_id)
        assert [entry.timer_id.value for entry in found] == ["kept"]


@pytest.mark.parametrize("backend", ["psycopg"], indirect=True)
def test_two_databases_commit_together(store: Store, databases: Databases) -> None:
    engine: Any = store.engine
    if int(store.sql("SHOW max_prepared_transactions")[0][0]) == 0:
        pytest.fail("the server prepares no transactions: start it with max_prepared_transactions = 10")
    made = databases.create()
    other: Engine = open_engine(made.set(drivername="postgresql+psycopg"))
    Base.metadata.create_all(other)
    sessions = sessionmaker(binds={Base: other, Timer: engine}, twophase=True)
    with sessions.begin() as session:
        session.add(Order(id=(kept := uuid4()), customer="ida"))
        TimerRepository(session).schedule(kept, "remind", NOW)
    undone = uuid4()

    def fail() -> None:
        with sessions.begin() as session:
            session.add(Order(id=undone, customer="jon"))
            session.flush()
            TimerRepository(session).schedule(undone, "remind", NOW)
            session.prepare()
            raise ConnectionError

    with pytest.raises(ConnectionError):
        fail()
    with sessions() as session:
        assert session.scalars(select(Order.customer)).all() == ["ida"]
        assert TimerRepository(session).get(kept, "remind") == TimerEntry(kept, "remind", NOW)
        assert TimerRepository(session).get(undone, "remind") is None
    with sessions() as session:
        session.add(Order(id=kept, customer="ida again"))
        TimerRepository(session).schedule(undone, "remind", NOW)
        with pytest.raises(IntegrityError):
            session.commit()
    with sessions() as session:
        session.add(Order(id=undone, customer="jon"))
        TimerRepository(session).schedule(undone, "remind", NOW)
        session.rollback()
    with sessions() as session:
        assert session.scalars(select(Order.customer)).all() == ["ida"]
        assert TimerRepository(session).get(undone, "remind") is None
    assert store.sql("SELECT count(*) FROM pg_prepared_xacts") == [(0,)]
    other.dispose()
    databases.drop(made)
