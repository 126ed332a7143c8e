from __future__ import annotations

from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import sessionmaker

from aion_timers.testing import FakeClock, Fired, run_due
from examples.subscription import Base, CardDeclinedError, Mail, Subscription, Subscriptions

DAY = timedelta(days=1)


class Bank:
    """A bank that a test can look into."""

    def __init__(self) -> None:
        self.paid: list[str] = []
        self.declines = False
        self.answers = True

    def charge(self, email: str, key: str) -> None:
        """Take a payment, if it can."""
        if self.declines:
            raise CardDeclinedError(email)
        if key not in self.paid:
            self.paid.append(key)
        if not self.answers:
            raise ConnectionError("no answer")


@pytest.fixture
def bank() -> Bank:
    return Bank()


@pytest.fixture(params=["libsql", "postgres"])
def engine(request: pytest.FixtureRequest) -> Engine:
    engine: Engine = request.getfixturevalue(f"timers_{request.param}_engine")
    Base.metadata.create_all(engine)
    return engine


@pytest.fixture
def subscriptions(engine: Engine, timers_clock: FakeClock, bank: Bank) -> Subscriptions:
    return Subscriptions(sessionmaker(engine), bank, timers_clock)


def stored(subscriptions: Subscriptions, subscription_id: UUID) -> tuple[Subscription, list[str]]:
    """The subscription and its mails, as they are now."""
    with subscriptions.sessions() as session:
        mails = select(Mail.subject).where(Mail.subscription_id == subscription_id).order_by(Mail.number)
        return session.get_one(Subscription, subscription_id), list(session.scalars(mails))


def names(fired: list[Fired]) -> list[str | int]:
    return [one.timer.timer_id.value for one in fired]


def test_a_trial_is_announced_to_end_and_then_paid_for_month_by_month(
    subscriptions: Subscriptions, timers_clock: FakeClock, bank: Bank
) -> None:
    started = timers_clock.now()
    subscription_id = subscriptions.start("ada@example.org")
    dispatcher = subscriptions.dispatcher()

    assert run_due(dispatcher, until=started + 10 * DAY) == []

    assert names(run_due(dispatcher, until=started + 13 * DAY)) == ["trial-reminder"]
    assert stored(subscriptions, subscription_id)[1] == ["Your trial ends in 3 days"]

    fired = run_due(dispatcher, until=started + 75 * DAY)
    assert [one.at - started for one in fired] == [14 * DAY, 44 * DAY, 74 * DAY]
    assert len(bank.paid) == stored(subscriptions, subscription_id)[0].periods_paid == 3


def test_one_who_cancels_hears_nothing_more(subscriptions: Subscriptions, timers_clock: FakeClock, bank: Bank) -> None:
    subscription_id = subscriptions.start("ada@example.org")
    dispatcher = subscriptions.dispatcher()
    run_due(dispatcher, until=timers_clock.now() + 20 * DAY)

    subscriptions.cancel(subscription_id)

    assert run_due(dispatcher, until=timers_clock.now() + 365 * DAY) == []
    assert len(bank.paid) == 1


def test_a_declined_card_is_tried_once_a_day_and_ends_the_subscription_after_four(
    subscriptions: Subscriptions, timers_clock: FakeClock, bank: Bank
) -> None:
    bank.declines = True
    started = timers_clock.now()
    subscription_id = subscriptions.start("ada@example.org")

    fired = run_due(subscriptions.dispatcher(), until=started + 90 * DAY, raise_handler_errors=False)

    assert [(one.at - started, type(one.error)) for one in fired[1:]] == [
        (14 * DAY, CardDeclinedError),
        (15 * DAY, CardDeclinedError),
        (16 * DAY, CardDeclinedError),
        (17 * DAY, type(None)),
    ]
    subscription, mails = stored(subscriptions, subscription_id)
    assert subscription.ended
    assert mails == ["Your trial ends in 3 days", "Your subscription has ended"]


def test_a_payment_whose_answer_was_lost_is_not_taken_twice(
    subscriptions: Subscriptions, timers_clock: FakeClock, bank: Bank
) -> None:
    bank.answers = False
    started = timers_clock.now()
    subscription_id = subscriptions.start("ada@example.org")
    dispatcher = subscriptions.dispatcher()

    with pytest.raises(ConnectionError, match="no answer"):
        run_due(dispatcher, until=started + 20 * DAY)
    assert timers_clock.now() == started + 14 * DAY

    bank.answers = True
    run_due(dispatcher, until=started + 20 * DAY)
    assert len(bank.paid) == stored(subscriptions, subscription_id)[0].periods_paid == 1
