#!/usr/bin/env python3
"""A shop that reminds its customers to pay: durable timers beside its own orders, in one libSQL file.

``make demo`` runs it. It checks itself: the exit code is 1 if a count in the summary is not what it has to be.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn
from uuid import UUID, uuid4

from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Column, Table
from sqlalchemy import Engine, create_engine, exists, func, inspect, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column, sessionmaker

from aion_timers import Timer, TimerEntry, TimerRepository, migrate

REMINDER = "payment-reminder"
OTHER_PROGRAMS_FILE = Path(__file__).parents[1] / "tests" / "data" / "aion-0.1.0.db"

console = Console(highlight=False)


# -- the application --------------------------------------------------------------------------------------------------


class Base(MappedAsDataclass, DeclarativeBase):
    """The application's own tables; the timers' table belongs to the library, in a metadata of its own."""


class Order(Base):
    """An order that waits for its payment."""

    __tablename__ = "orders"

    # a default_factory gives the id at once, a default only at the flush: the timer needs it before
    id: Mapped[UUID] = mapped_column(primary_key=True, default_factory=uuid4, init=False)
    customer: Mapped[str]
    paid: Mapped[bool] = mapped_column(default=False)
    reminded: Mapped[bool] = mapped_column(default=False)


def place_order(session: Session, customer: str, remind_at: datetime) -> Order:
    """An order and its reminder: when the caller commits, both are there; else neither."""
    order = Order(customer)
    session.add(order)
    TimerRepository(session).schedule(order.id, REMINDER, remind_at)
    return order


def receive_payment(session: Session, order_id: UUID) -> None:
    """Who has paid is not reminded."""
    session.get_one(Order, order_id).paid = True
    TimerRepository(session).cancel(order_id, REMINDER)


def give_more_time(session: Session, order_id: UUID, remind_at: datetime) -> None:
    """An order has one timer of this name: to schedule it again is to move it."""
    TimerRepository(session).schedule(order_id, REMINDER, remind_at)


def send_reminders(session: Session, limit: int) -> list[TimerEntry]:
    """Take due reminders and mark their orders, in one transaction: a crash neither loses nor repeats one."""
    due = TimerRepository(session).take(limit=limit, names=[REMINDER])
    for order in session.scalars(select(Order).where(Order.id.in_([timer.workflow_id for timer in due]))):
        order.reminded = True
    return due


# -- what the demo does with it ---------------------------------------------------------------------------------------

Promises = dict[UUID, datetime]
"""When each order's reminder is due: the demo's own books, which it compares with the file."""


@dataclass(frozen=True)
class Check:
    """A line of the summary."""

    what: str
    expected: int
    found: int


def some_instant() -> datetime:
    """For one order in four within the last day, as if no worker had run since; for the others in the next days."""
    hours = random.uniform(1, 72) if random.randrange(4) else random.uniform(-24, 0)
    return datetime.now(UTC) + timedelta(hours=hours)


def all_timers(session: Session) -> Promises:
    """The model `Timer` is there for queries of one's own."""
    return {timer.workflow_id: timer.fire_at for timer in session.execute(select(Timer.workflow_id, Timer.fire_at))}


def create_tables(engine: Engine) -> list[Check]:
    """The host makes its own tables as it likes; those of the library come from Alembic scripts that travel with it."""
    console.rule("1. Migrate", align="left")
    Base.metadata.create_all(engine)
    migrate.upgrade(engine)  # on the command line: alembic -x url=sqlite+libsql:///shop.db upgrade head
    migrate.check(engine)
    tables = inspect(engine).get_table_names()
    console.print(f"Alembic is at revision {migrate.current(engine)}. Tables: {', '.join(tables)}.")
    return [Check("tables for orders and timers", 2, len({"orders", "timers"}.intersection(tables)))]


def place_orders(sessions: sessionmaker[Session], promised: Promises, count: int) -> list[Check]:
    """Many small transactions, each of up to 20 orders with their reminders."""
    console.rule(f"2. Place {count:,} orders, each with its reminder", align="left")
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        bar = progress.add_task("orders", total=count)
        for first in range(0, count, 20):
            placed = {}
            with sessions.begin() as session:
                for number in range(first, min(first + 20, count)):
                    at = some_instant()
                    placed[place_order(session, f"customer {number}", at).id] = at
            promised |= placed
            progress.advance(bar, len(placed))
    with sessions() as session:
        joined = select(func.count()).select_from(Order).join(Timer, Timer.workflow_id == Order.id)
        return [Check("orders joined with their timers", count, session.scalars(joined).one())]


def change_orders(sessions: sessionmaker[Session], promised: Promises) -> list[Check]:
    """Some customers pay, some get another week."""
    chosen = random.sample(list(promised), k=len(promised) // 10)
    paid, later = chosen[::2], {order_id: promised[order_id] + timedelta(weeks=1) for order_id in chosen[1::2]}
    console.rule(f"3. {len(paid):,} customers pay, {len(later):,} get another week", align="left")
    with sessions.begin() as session:
        for order_id in paid:
            receive_payment(session, order_id)
        for order_id, at in later.items():
            give_more_time(session, order_id, at)
    promised |= later
    for order_id in paid:
        del promised[order_id]
    with sessions() as session:
        stored = all_timers(session)
    cancelled, moved = len(paid) - len(stored.keys() & paid), len(stored.items() & later.items())
    console.print(f"{cancelled:,} reminders are cancelled, {moved:,} stand at their new instant.")
    return [Check("timers cancelled", len(paid), cancelled), Check("timers moved", len(later), moved)]


def roll_back(sessions: sessionmaker[Session]) -> list[Check]:
    """An error of the application takes back its rows and their timers alike."""
    console.rule("4. A transaction is rolled back", align="left")
    try:
        with sessions.begin() as session:
            placed = {place_order(session, "nobody", some_instant()).id for _ in range(20)}
            inside = len(placed & all_timers(session).keys())
            raise ConnectionError("the card service is down")  # noqa: TRY301 - the application's error, in its place
    except ConnectionError as error:
        console.print(f"{inside} new timers were there inside the transaction, then: {error}.")
    with sessions() as session:
        timers = len(placed & all_timers(session).keys())
        orders = len(placed.intersection(session.scalars(select(Order.id))))
    console.print(f"Afterwards there are {timers} of the timers and {orders} of the orders.")
    return [
        Check("timers inside the transaction", len(placed), inside),
        Check("timers and orders after its rollback", 0, timers + orders),
    ]


def place_orders_until_killed(sessions: sessionmaker[Session]) -> NoReturn:
    """What the child process does: it tells what it has written, and after each commit that it is committed."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # when nobody listens any more, this process ends too
    while True:
        with sessions.begin() as session:
            for _ in range(200):
                at = some_instant()
                sys.stdout.write(f"{place_order(session, 'customer of the child', at).id} {at.isoformat()}\n")
                sys.stdout.flush()
        sys.stdout.write("committed\n")
        sys.stdout.flush()


def run_and_kill(command: Sequence[str]) -> tuple[int, Promises, Promises]:
    """The killed child's return code, what it told to be committed, and what it had written since."""
    # in a session of its own: Ctrl-C reaches this process alone, which then ends the child
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:  # noqa: S603 - this script
        told = child.stdout or ()
        try:
            lines = list(islice(told, random.randint(1020, 1180)))  # five transactions and a part of the sixth
        finally:
            child.kill()
        lines += told
    committed: Promises = {}
    in_flight: Promises = {}
    for line in lines:
        match line.split():
            case ["committed"]:
                committed |= in_flight
                in_flight = {}
            case [order_id, at] if line.endswith("\n"):  # the kill may have cut the last line
                in_flight[UUID(order_id)] = datetime.fromisoformat(at)
    return child.returncode, committed, in_flight


def kill_a_process(sessions: sessionmaker[Session], promised: Promises, database: Path) -> list[Check]:
    """What a killed process had committed has to be there, whole; of the rest, nothing."""
    console.rule("5. A process that places orders is killed with SIGKILL", align="left")
    code, committed, in_flight = run_and_kill([sys.executable, __file__, "--as-child", str(database)])
    with sessions() as session:
        stored = all_timers(session)
        belong = exists().where(Timer.workflow_id == Order.id)
        bare_orders = session.scalars(select(func.count(Order.id)).where(~belong, ~Order.paid)).one()
        bare_timers = session.scalars(select(func.count(Timer.fire_at)).where(~belong)).one()
    kept, survived = len(committed.items() & stored.items()), len(in_flight.items() & stored.items())
    console.print(f"It had committed {len(committed):,} orders: {kept:,} of their timers are there.")
    console.print(f"In the next transaction it had written {len(in_flight)} timers: {survived} are there.")
    promised |= committed
    if survived == len(in_flight):  # the kill came after this commit, and before the child could tell
        promised |= in_flight
    return [
        Check("signal that ended the child", signal.SIGKILL, -code),
        Check("timers that it had committed", len(committed), kept),
        Check("transactions that the kill left half done", 0, int(0 < survived < len(in_flight))),
        Check("unpaid orders without timer, timers without order", 0, bare_orders + bare_timers),
        Check("timers in the file", len(promised), len(stored)),
    ]


def remind(sessions: sessionmaker[Session], promised: Promises) -> list[Check]:
    """Take all that is due, the earliest first."""
    console.rule("6. Take the reminders that are due", align="left")
    now = datetime.now(UTC)
    due = {order_id: at for order_id, at in promised.items() if at <= now}
    sent: list[TimerEntry] = []
    while True:
        with sessions.begin() as session:
            batch = send_reminders(session, limit=500)
        if not batch:
            break
        sent += batch
    table = Table("was due (UTC)", "late by", "customer")
    with sessions() as session:
        for timer in sent[:5]:
            late = str(now - timer.fire_at).partition(".")[0]
            table.add_row(f"{timer.fire_at:%d %b %H:%M:%S}", late, session.get_one(Order, timer.workflow_id).customer)
        reminded = session.scalars(select(func.count()).select_from(Order).where(Order.reminded)).one()
        left = all_timers(session)
        following = TimerRepository(session).next_fire_at()
    console.print(f"{len(sent):,} were due, the first of them:", table)
    console.print(f"{len(left):,} are left, the next one for {following:%d %b %H:%M:%S}.")
    taken = len(due.items() & {(timer.workflow_id, timer.fire_at) for timer in sent})
    order = [(timer.fire_at, str(timer.workflow_id)) for timer in sent]
    return [
        Check("due timers taken", len(due), taken),
        Check("timers taken early, or twice", 0, len(sent) - taken),
        Check("timers taken out of order", 0, sum(one > other for one, other in pairwise(order))),
        Check("orders marked as reminded", len(due), reminded),
        Check("timers left for later", len(promised) - len(due), len(left)),
    ]


def adopt_a_file(database: Path) -> list[Check]:
    """Migrating adopts the table of a Rust program, the crate aion-store-libsql 0.1.0, which can go on using it."""
    console.rule("7. Open a file that another program wrote", align="left")
    shutil.copyfile(OTHER_PROGRAMS_FILE, database)
    engine = create_engine(f"sqlite+libsql:///{database}")
    as_stored = text("SELECT workflow_id, timer_id, fire_at FROM timers")
    with Session(engine) as session:
        before = set(session.execute(as_stored))
    migrate.upgrade(engine)
    with Session(engine) as session:
        changed = before.symmetric_difference(session.execute(as_stored))
        timers = TimerRepository(session)
        expired = timers.expired(datetime(2026, 6, 3, 2, 30, tzinfo=UTC))
        everything = timers.expired(datetime.max.replace(tzinfo=UTC))
    engine.dispose()
    table = Table("due (UTC)", "timer")
    for timer in expired[-5:]:
        table.add_row(timer.fire_at.isoformat(" ", "microseconds")[:-6], escape(repr(timer.timer_id)))
    console.print(f"{len(expired)} of its {len(everything)} timers are due on 3 June 2026, 2:30; the last:", table)
    return [
        Check("timers in the other program's file", 120, len(everything)),
        Check("its rows that the migration changed", 0, len(changed)),
    ]


def summary(checks: Sequence[Check]) -> int:
    """Print the checks; the exit code is 1 if one of them failed."""
    console.rule("Summary", align="left")
    table = Table("what", *(Column(heading, justify="right") for heading in ("expected", "found", "ok")))
    for check in checks:
        ok = "yes" if check.found == check.expected else "[bold red]NO[/]"
        table.add_row(check.what, f"{check.expected:,}", f"{check.found:,}", ok)
    console.print(table)
    return int(any(check.found != check.expected for check in checks))


def main() -> int:
    """Run the demo, or what its child process does."""
    parser = argparse.ArgumentParser(description="Order reminders: durable timers in a libSQL file.")
    parser.add_argument("--timers", type=int, default=10_000, help="how many to schedule (default: 10000)")
    parser.add_argument("--as-child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_child:
        place_orders_until_killed(sessionmaker(create_engine(f"sqlite+libsql:///{options.as_child}")))
    with TemporaryDirectory(prefix="order-reminders-") as directory:
        database = Path(directory, "shop.db")
        engine = create_engine(f"sqlite+libsql:///{database}")
        sessions = sessionmaker(engine)
        promised: Promises = {}
        checks = create_tables(engine)
        checks += place_orders(sessions, promised, options.timers)
        checks += change_orders(sessions, promised)
        checks += roll_back(sessions)
        checks += kill_a_process(sessions, promised, database)
        checks += remind(sessions, promised)
        checks += adopt_a_file(Path(directory, "aion.db"))
        engine.dispose()
    return summary(checks)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        console.print("interrupted")
        sys.exit(128 + signal.SIGINT)
