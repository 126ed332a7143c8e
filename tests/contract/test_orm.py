"""The manners of the ORM: relationships to timers, events and expiry, and sessions of several engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import URL, create_engine, event, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    foreign,
    immediateload,
    joinedload,
    lazyload,
    mapped_column,
    relationship,
    selectinload,
    subqueryload,
)

from aion_timers import Timer, TimerRepository, migrate
from tests.conftest import Databases
from tests.store import Store

NOW = datetime(2026, 6, 3, 2, 30, tzinfo=UTC)


class Base(DeclarativeBase):
    """The host's own base."""


class Order(Base):
    """A host's table whose key is a workflow id."""

    __tablename__ = "orders"
    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    customer: Mapped[str] = mapped_column(unique=True)
    timers: Mapped[list[Timer]] = relationship(
        Timer, primaryjoin=lambda: foreign(Timer.workflow_id) == Order.id, order_by=Timer.fire_at, viewonly=True
    )


@pytest.fixture
def shop(store: Store) -> Iterator[Store]:
    """A store with two orders that have two timers each, and one that has none."""
    with store.connection() as connection:
        if store.is_async:
            connection.run_sync(Base.metadata.create_all)
        else:
            Base.metadata.create_all(connection)
    with store.session() as session:
        for customer in ("ann", "bob"):
            session.add(order := Order(id=uuid4(), customer=customer))
            store.repository(session).schedule(order.id, "second", NOW + timedelta(days=1))
            store.repository(session).schedule(order.id, "first", NOW)
        session.add(Order(customer="cyd"))
    return store


def in_session(store: Store, work: Callable[[Session], Any]) -> Any:
    """What lazy loading does needs a sync session, which an async one has inside."""
    with store.session() as session:
        if store.is_async:
            wrapped: AsyncSession = session.wrapped
            return store.runner.run(wrapped.run_sync(work))
        return work(session)


@pytest.mark.parametrize("load", [lazyload, immediateload, joinedload, selectinload, subqueryload])
def test_a_row_of_the_host_has_its_timers(shop: Store, load: Callable[..., Any]) -> None:
    def names(session: Session) -> dict[str, list[Any]]:
        orders = session.scalars(select(Order).options(load(Order.timers))).unique()
        return {order.customer: [timer.timer_id.value for timer in order.timers] for order in orders}

    assert in_session(shop, names) == {"ann": ["first", "second"], "bob": ["first", "second"], "cyd": []}


def test_a_relationship_serves_in_conditions(shop: Store) -> None:
    with shop.session() as session:
        due = select(Order.customer).where(Order.timers.any(Timer.fire_at <= NOW)).order_by(Order.customer)
        assert session.scalars(due).all() == ["ann", "bob"]
        assert session.scalars(select(Order.customer).where(~Order.timers.any())).all() == ["cyd"]
        counted = select(Order.customer, func.count()).join(Order.timers).group_by(Order.customer)
        assert dict(session.execute(counted).all()) == {"ann": 2, "bob": 2}


def test_what_the_repository_changes_is_loaded_anew(shop: Store) -> None:
    later = NOW + timedelta(days=9)

    def move(session: Session) -> tuple[datetime, list[Any]]:
        order = session.scalars(select(Order).filter_by(customer="ann")).one()
        first, _ = order.timers
        timers = TimerRepository(session)
        timers.schedule(order.id, "first", later)
        moved = first.fire_at
        timers.cancel(order.id, "second")
        session.expire(order, ["timers"])
        return moved, [timer.timer_id.value for timer in order.timers]

    assert in_session(shop, move) == (later, ["first"])


def test_a_session_that_expires_nothing_keeps_what_it_has_loaded(shop: Store) -> None:
    session = shop.new_session(expire_on_commit=False)
    timer = session.scalars(select(Timer).order_by(Timer.fire_at, Timer.workflow_id).limit(1)).one()
    session.commit()
    assert timer.fire_at == NOW
    session.close()


def test_a_failed_flush_takes_the_timers_with_it(shop: Store) -> None:
    order_id = uuid4()
    session = shop.new_session()
    shop.repository(session).schedule(order_id, "first", NOW)
    session.add(Order(id=order_id, customer="ann"))
    with pytest.raises(IntegrityError):
        session.commit()
    session.close()
    with shop.timers() as timers:
        assert timers.list_workflow(order_id) == []


def test_the_hosts_events_see_one_transaction(shop: Store) -> None:
    seen: list[str] = []
    with shop.session() as session:
        sync = session.wrapped.sync_session if shop.is_async else session
        for name in ("after_begin", "before_commit", "after_commit", "after_rollback"):
            event.listen(sync, name, lambda *_, name=name: seen.append(name))
        session.add(order := Order(id=uuid4(), customer="dee"))
        timers = shop.repository(session)
        timers.schedule(order.id, "first", NOW)
        timers.cancel(order.id, "first")
    assert seen == ["after_begin", "before_commit", "after_commit"]


@pytest.mark.parametrize("backend", ["psycopg"], indirect=True)
@pytest.mark.parametrize("ends", ["commit", "rollback", "fails"])
def test_one_session_keeps_orders_and_timers_on_two_servers(url: URL, databases: Databases, ends: str) -> None:
    other = databases.create()
    orders, timers = create_engine(other.set(drivername=url.drivername)), create_engine(url)
    Base.metadata.create_all(orders)
    with Session(orders) as session, session.begin():
        session.add(Order(customer="ann"))
    order_id = uuid4()
    with Session(binds={Order: orders, Timer: timers}, twophase=True) as session:
        session.add(Order(id=order_id, customer="ann" if ends == "fails" else "bob"))
        TimerRepository(session).schedule(order_id, "first", NOW)
        assert TimerRepository(session).get(order_id, "first") is not None
        if ends == "fails":
            with pytest.raises(IntegrityError):
                session.commit()
        else:
            getattr(session, ends)()
    with Session(binds={Order: orders, Timer: timers}) as session:
        there = session.get(Order, order_id) is not None, TimerRepository(session).get(order_id, "first") is not None
    assert there == (ends == "commit", ends == "commit")
    with timers.connect() as connection:
        migrate.check(connection)
    orders.dispose()
    timers.dispose()
    databases.drop(other)
