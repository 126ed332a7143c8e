"""A worker of the shop, ``python -m examples.worker shop.db``: it fires timers until it is told to stop, or killed.

Start as many as you like: each timer goes to one of them at a time.
"""

import logging
import os
import signal
import sys
from datetime import timedelta
from uuid import UUID

from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session, sessionmaker

from aion_timers import Backoff, Delivery, Dispatcher, TimerRepository
from examples.shop import REMINDER, Letter, Order

SECOND_REMINDER = "second-reminder"
LEASE = timedelta(seconds=2)
"""How soon another worker takes over from one that died. The default of 30 seconds is more usual."""


def fails_at_first(order_id: UUID) -> bool:
    """For one order in twenty the mail server is busy at the first try."""
    return order_id.int % 20 == 0


def is_reminded_twice(order_id: UUID) -> bool:
    """One order in twenty gets a second reminder."""
    return order_id.int % 20 == 1


def send_letter(session: Session, delivery: Delivery) -> UUID:
    """Write down that the letter is sent, and how late."""
    order = session.get_one(Order, delivery.timer.workflow_id)
    if fails_at_first(order.id) and delivery.attempt == 1:
        raise ConnectionError("the mail server is busy")
    late = TimerRepository(session).now() - delivery.timer.fire_at
    name = str(delivery.timer.timer_id.value)
    session.add(Letter(order.id, name, late / timedelta(milliseconds=1), delivery.attempt, os.getpid()))
    return order.id


def remind(delivery: Delivery) -> None:
    """The letter, the end of this timer and the next timer are committed together, or none of them."""
    with delivery.transaction() as session:
        order_id = send_letter(session, delivery)
        if is_reminded_twice(order_id):
            timers = TimerRepository(session)
            timers.schedule(order_id, SECOND_REMINDER, timers.now() + timedelta(seconds=1))


def remind_again(delivery: Delivery) -> None:
    """The last letter."""
    with delivery.transaction() as session:
        send_letter(session, delivery)


def open_engine(file: str) -> Engine:
    """At NORMAL a commit doesn't wait for the disk: it outlives every kill, but not each power failure."""
    return create_engine(f"sqlite+libsql:///{file}", synchronous="NORMAL")


def main() -> None:
    """Fire timers until SIGTERM."""
    logging.basicConfig(level=logging.ERROR)  # a failure that is tried again is a WARNING
    dispatcher = Dispatcher(
        sessionmaker(open_engine(sys.argv[1])),
        {REMINDER: remind, SECOND_REMINDER: remind_again},
        lease=LEASE,
        retry=Backoff(first=timedelta(seconds=0.5)),
    )
    signal.signal(signal.SIGTERM, lambda *_: dispatcher.stop())
    dispatcher.run()


if __name__ == "__main__":
    main()
