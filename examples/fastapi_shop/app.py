"""The HTTP side: it schedules and cancels, and fires nothing."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator  # noqa: TC003 - FastAPI reads annotations when it runs
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Annotated
from uuid import UUID, uuid4

from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from aion_timers import AsyncTimerRepository, migrate
from examples.fastapi_shop.models import REMINDER, Base, Order


class NewOrder(BaseModel):
    """What a customer sends."""

    customer: str
    remind_after: timedelta = timedelta(days=3)


class ShownOrder(BaseModel):
    """What a customer sees."""

    id: UUID
    customer: str
    paid: bool
    reminders: int
    next_reminder: datetime | None


async def session_of(request: Request) -> AsyncIterator[AsyncSession]:
    """A session for a request: committed if all goes well, with the timers in it."""
    async with request.app.state.sessions.begin() as session:
        yield session


# committed before the answer is sent, so that who is told of an order can rely on it
Db = Annotated[AsyncSession, Depends(session_of, scope="function")]


def create_app(url: str | None = None) -> FastAPI:
    """The application, on the database of the URL or of ``DATABASE_URL``."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = create_async_engine(url or os.environ["DATABASE_URL"])
        async with engine.begin() as connection:
            await connection.run_sync(migrate.upgrade)
            await connection.run_sync(Base.metadata.create_all)
        app.state.sessions = async_sessionmaker(engine, expire_on_commit=False)
        yield
        await engine.dispose()

    app = FastAPI(lifespan=lifespan)

    @app.post("/orders", status_code=201)
    async def place(new: NewOrder, session: Db) -> ShownOrder:
        session.add(order := Order(id=uuid4(), customer=new.customer))
        timers = AsyncTimerRepository(session)
        await timers.schedule(order.id, REMINDER, await timers.now() + new.remind_after)
        await session.flush()
        return await shown(order, session)

    @app.post("/orders/{order_id}/payment")
    async def pay(order_id: UUID, session: Db) -> ShownOrder:
        order = await found(order_id, session)
        order.paid = True
        await AsyncTimerRepository(session).cancel(order_id, REMINDER)
        return await shown(order, session)

    @app.get("/orders/{order_id}")
    async def show(order_id: UUID, session: Db) -> ShownOrder:
        return await shown(await found(order_id, session), session)

    return app


async def found(order_id: UUID, session: AsyncSession) -> Order:
    """The order, or 404."""
    order = await session.get(Order, order_id)
    if order is None:
        raise HTTPException(404, f"there is no order {order_id}")
    return order


async def shown(order: Order, session: AsyncSession) -> ShownOrder:
    """The order with its next reminder."""
    timer = await AsyncTimerRepository(session).get(order.id, REMINDER)
    return ShownOrder(
        id=order.id,
        customer=order.customer,
        paid=order.paid,
        reminders=order.reminders,
        next_reminder=timer and timer.fire_at,
    )
