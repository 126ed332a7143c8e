"""The worker: ``python -m examples.fastapi_shop.worker``."""

from __future__ import annotations

import asyncio
import os
import signal

from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from aion_timers import AsyncDelivery, AsyncDispatcher, AsyncTimerRepository
from examples.fastapi_shop.models import AGAIN, REMINDER, Order


async def remind(delivery: AsyncDelivery) -> None:
    """Enter a reminder and schedule the next one, together with the end of this timer."""
    async with delivery.transaction() as session:
        order = await session.get_one(Order, delivery.timer.workflow_id, with_for_update=True)
        if not order.paid:
            order.reminders += 1
            timers = AsyncTimerRepository(session)
            await timers.schedule(order.id, REMINDER, await timers.now() + AGAIN)


async def main() -> None:
    """Fire timers until SIGTERM or Ctrl-C."""
    engine = create_async_engine(os.environ["DATABASE_URL"])
    dispatcher = AsyncDispatcher(async_sessionmaker(engine), {REMINDER: remind}, concurrency=4)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, dispatcher.stop)
    await dispatcher.run()
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main())
