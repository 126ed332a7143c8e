"""The model in a host application's own queries, beside the host's own tables."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import exists, func, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, aliased, mapped_column

from aion_timers import InvalidInputError, Timer, TimerEntry, TimerId
from tests.store import Store

NOW = datetime(2026, 6, 3, 2, 30, tzinfo=UTC)


class Base(DeclarativeBase):
    """The host's own base."""


class Order(Base):
    """A host's table whose key is a workflow id."""

    __tablename__ = "orders"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    customer: Mapped[str]


@pytest.fixture
def shop(store: Store) -> Iterator[tuple[Store, list[Order]]]:
    """Three orders, of which the first two have timers."""
    orders = [Order(id=uuid4(), customer=name) for name in ("ann", "bob", "cyd")]
    with store.connection() as connection:
        if store.is_async:
            connection.run_sync(Base.metadata.create_all)
        else:
            Base.metadata.create_all(connection)
    with store.session(expire_on_commit=False) as session:
        session.add_all(orders)
        session.flush()
        timers = store.repository(session)
        timers.schedule(orders[0].id, "remind", NOW)
        timers.schedule(orders[1].id, "remind", NOW + timedelta(days=1))
        timers.schedule(orders[1].id, 7, NOW)
    yield store, orders
    with store.connection() as connection:
        if store.is_async:
            connection.run_sync(Base.metadata.drop_all)
        else:
            Base.metadata.drop_all(connection)


def names(session: Any, statement: Any) -> list[str]:
    return sorted(session.scalars(statement).all())


def test_a_host_joins_its_rows_with_their_timers(shop: tuple[Store, list[Order]]) -> None:
    store, _ = shop
    due = Timer.fire_at <= NOW
    other = aliased(Timer)
    with store.session() as session:
        assert names(session, select(Order.customer).join(Timer, Timer.workflow_id == Order.id).where(due)) == [
            "ann",
            "bob",
        ]
        assert names(session, select(Order.customer).select_from(Timer).join(Order, Timer.workflow_id == Order.id)) == [
            "ann",
            "bob",
            "bob",
        ]
        assert names(
            session,
            select(Order.customer).outerjoin(other, other.workflow_id == Order.id).where(other.fire_at.is_(None)),
        ) == ["cyd"]
        assert names(session, select(Order.customer).where(exists().where(Timer.workflow_id == Order.id))) == [
            "ann",
            "bob",
        ]
        assert names(session, select(Order.customer).where(~exists().where(Timer.workflow_id == Order.id))) == ["cyd"]
        in_orders = select(func.count(Timer.fire_at)).where(
            Timer.workflow_id.in_(select(Order.id).where(Order.customer == "bob"))
        )
        assert session.scalar(in_orders) == 2
        not_in_orders = select(func.count(Timer.fire_at)).where(
            Timer.workflow_id.not_in(select(Order.id).where(Order.customer == "bob"))
        )
        assert session.scalar(not_in_orders) == 1


def test_rows_and_timers_are_loaded_together(shop: tuple[Store, list[Order]]) -> None:
    store, orders = shop
    with store.session() as session:
        rows = session.execute(
            select(Order, Timer)
            .join(Timer, Timer.workflow_id == Order.id)
            .order_by(Timer.fire_at, Order.customer, Timer.timer_id)
        ).all()
        assert [(order.customer, timer.timer_id.value, timer.fire_at) for order, timer in rows] == [
            ("ann", "remind", NOW),
            ("bob", 7, NOW),
            ("bob", "remind", NOW + timedelta(days=1)),
        ]
        assert {timer.workflow_id for _, timer in rows} == {orders[0].id, orders[1].id}
        assert "TimerId.named('remind')" in repr(rows[0][1])


def test_columns_go_through_subqueries_unions_and_aggregates(shop: tuple[Store, list[Order]]) -> None:
    store, orders = shop
    with store.session() as session:
        inner = select(Timer.workflow_id, func.min(Timer.fire_at).label("first")).group_by(Timer.workflow_id).subquery()
        first = dict(session.execute(select(inner.c.workflow_id, inner.c.first)).all())
        assert first == {orders[0].id: NOW, orders[1].id: NOW}
        both = (
            select(Timer.timer_id)
            .where(Timer.timer_id == 7)
            .union_all(select(Timer.timer_id).where(Timer.timer_id == "remind"))
        )
        assert {row[0].value for row in session.execute(both)} == {7, "remind"}
        assert session.scalar(select(Timer.fire_at).where(Timer.timer_id == TimerId.anonymous(7))) == NOW


def test_the_table_is_queried_without_the_orm(shop: tuple[Store, list[Order]]) -> None:
    store, orders = shop
    with store.connection() as connection:
        table = Timer.__table__
        row = connection.execute(select(table).where(table.c.workflow_id == orders[0].id)).one()
        assert TimerEntry(*row[:3]) == TimerEntry(orders[0].id, "remind", NOW)


def test_bad_values_for_a_column_are_named(shop: tuple[Store, list[Order]]) -> None:
    store, _ = shop
    for condition in (Timer.fire_at <= datetime(2026, 6, 3), Timer.workflow_id == "x", Timer.timer_id == ""):  # noqa: DTZ001 - naive on purpose
        with store.session() as session, pytest.raises(Exception, match=r"naive|not a uuid|empty"):
            session.execute(select(Timer).where(condition))


def test_what_the_hosts_own_sql_fetches_is_read_right(shop: tuple[Store, list[Order]]) -> None:
    store, _ = shop
    with store.session() as session:
        if not store.is_sqlite:
            session.execute(text("SET timezone = 'Asia/Tokyo'"))
        whole = select(Timer).from_statement(text("SELECT * FROM timers ORDER BY fire_at, timer_id"))
        assert [timer.fire_at for timer in session.scalars(whole)] == [NOW, NOW, NOW + timedelta(days=1)]
        column = text("SELECT fire_at FROM timers ORDER BY fire_at").columns(Timer.fire_at)
        found = session.execute(column).scalars().all()
        assert found[0] == NOW
        assert found[0].utcoffset() == timedelta(0)
        session.rollback()


def test_instants_are_compared_with_those_of_other_types(shop: tuple[Store, list[Order]]) -> None:
    store, orders = shop
    now = datetime.now(UTC)
    with store.session() as session:
        timers = store.repository(session)
        timers.cancel_workflow(orders[0].id)
        timers.cancel_workflow(orders[1].id)
        timers.schedule(orders[0].id, "past", now - timedelta(minutes=5))
        timers.schedule(orders[0].id, "future", now + timedelta(minutes=5))
        past = session.scalars(select(Timer.timer_id).where(Timer.fire_at <= func.now())).all()
        assert [timer_id.value for timer_id in past] == ["past"]
        same = session.scalars(select(Timer.timer_id).where(Timer.fire_at == now - timedelta(minutes=5))).all()
        assert [timer_id.value for timer_id in same] == ["past"]


@pytest.mark.parametrize(
    "compare",
    [lambda t: t.startswith("r"), lambda t: t.like("r%"), lambda t: t.contains("e"), lambda t: ~t.ilike("r")],
    ids=["startswith", "like", "contains", "not ilike"],
)
def test_a_part_of_an_id_is_not_compared(compare: Any) -> None:
    with pytest.raises(InvalidInputError, match="names="):
        compare(Timer.timer_id)


def test_a_workflow_id_is_not_compared_with_text() -> None:
    with pytest.raises(InvalidInputError, match="Uuid"):
        select(Order).where(Timer.workflow_id == Order.customer)
